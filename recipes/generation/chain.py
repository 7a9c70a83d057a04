"""Fine-tune the shipped decoder on ciphertexts of a private text, then generate on ciphertexts with the adapter, which nobody but the client can read.

    python recipes/generation/chain.py                                  simulator, 5 steps, a few minutes

The LoRA weights of the last layer are ciphertexts from their first value on. Each step: encrypted forward, the client turns decrypted logits into an
encrypted gradient of the language-model loss, encrypted backward, encrypted SGD. A plaintext twin in polynomial mode takes the same steps. The trained
ciphertexts then go into a GenerationServer as they are. Client and server share this process; the server's objects hold evaluation keys only.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings

import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import AutoTokenizer

from hf_he import GenerationClient, GenerationServer, encrypted_generate
from hf_he.backends import get_backend
from hf_he.checkpoints import default_decoder
from hf_he.ckks.parameters import parameter_set
from hf_he.finetuning.adapter import AdapterLayout, EncryptedAdapter
from hf_he.generation.adapter import EncryptedLora
from hf_he.keys import Keys
from hf_he.packing import pack_embeddings, unpack_state
from hf_he.peft import HELoraConfig
from hf_he.refresh import ClientRefresh
from hf_he.tensor import EncryptedSession

TEXT = "My dear sister, the garden is in bloom again, and the old pear tree by the wall has more flowers than I ever saw. Come and see it before the rain."
warnings.simplefilter("ignore", FutureWarning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=8.0)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--prompt", default="My dear sister,")
    parser.add_argument("--max-new-tokens", type=int, default=8)
    arguments = parser.parse_args()

    directory = default_decoder()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    backend = get_backend("simulator", parameter_set("n14"))
    client = GenerationClient(directory, backend, context=arguments.context)
    packing = client.packing
    client.use_keys(Keys.generate(backend, set(range(1, packing.slots))))
    secret = client.keys.secret
    last = client.model.config.num_hidden_layers - 1
    targets = (f"layers.{last}.attention.dense", f"layers.{last}.mlp.dense_4h_to_h")
    torch.manual_seed(0)
    twin = get_peft_model(copy.deepcopy(client.model), HELoraConfig(r=2, target_modules=list(targets))).eval()
    layout = AdapterLayout.of(twin, packing)

    ids = torch.tensor([(tokenizer(TEXT)["input_ids"] * packing.tokens)[: packing.tokens]])
    refresher = client.refresher()
    server = get_backend("simulator", backend.parameters)
    server.load_evaluation_keys(client.keys.evaluation.evaluation)
    session = EncryptedSession(server, packing, ClientRefresh(refresher))
    tuned = get_peft_model(copy.deepcopy(client.model).float(), HELoraConfig(r=2, target_modules=list(targets))).eval()
    adapter = EncryptedAdapter(session, tuned, layout, backend.encrypt(layout.pack(layout.values(twin)), secret))
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=arguments.learning_rate)

    for step in range(arguments.steps):
        logits = twin(ids).logits
        loss = F.cross_entropy(logits[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        adapter.install()
        state = session.hidden_state(backend.encrypt(pack_embeddings(client._embedded(ids), packing), secret))
        output = tuned.get_base_model()(inputs_embeds=state, use_cache=False).logits
        decrypted = torch.from_numpy(unpack_state(backend.decrypt(output.ciphertext, secret), packing, logits.shape[-1])).requires_grad_()
        encrypted_loss = F.cross_entropy(decrypted[0, :-1], ids[0, 1:])
        encrypted_loss.backward()
        gradient = session.hidden_state(backend.encrypt(pack_embeddings(decrypted.grad.numpy(), packing), secret), logits.shape[-1])
        torch.autograd.backward([output], [gradient])
        change = adapter.collect(arguments.learning_rate)
        adapter.replace(server.subtract(server.match_level(adapter.dense, change.level), change))
        print(f"step {step + 1}: loss on ciphertexts {encrypted_loss.item():.6f}, twin {loss.item():.6f}", flush=True)

    learned = layout.unpack(backend.decrypt(adapter.dense, secret))
    apart = max(float((learned[name] - value).abs().max()) for name, value in layout.values(twin).items())
    print(f"adapter after {arguments.steps} encrypted steps: within {apart:.1e} of the twin's, {session.refresh.count} refreshes")
    with tempfile.TemporaryDirectory() as folder:
        EncryptedLora(client.identity, 2, targets, server.serialize(adapter.dense)).save(folder)
        user = GenerationClient(directory, backend, client.keys, adapter=folder, context=arguments.context)
        user.server = GenerationServer(directory, client.keys.evaluation, adapter=folder, context=arguments.context)
        inputs = tokenizer(arguments.prompt, return_tensors="pt")
        settings = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False, "pad_token_id": 0}
        tokens = user.model.generate(**inputs, **settings, custom_generate=encrypted_generate, client=user)
    expected = twin.generate(**inputs, **settings)
    before = client.model.generate(**inputs, **settings)
    print(f"before:    {tokenizer.decode(before[0])!r}\nafter:     {tokenizer.decode(expected[0])!r}\nencrypted: {tokenizer.decode(tokens[0])!r}")
    print(f"tokens as the twin's: {tokens.tolist() == expected.tolist()}, largest logit error {user.last.max_logit_error:.1e}")


if __name__ == "__main__":
    main()
