"""`encrypted_generate`: what transformers' `generate` calls to produce tokens on ciphertexts.

    model.generate(**inputs, custom_generate=hf_he.encrypted_generate, client=client, max_new_tokens=16)
    pipeline("text-generation", model=model, tokenizer=tokenizer)(text, custom_generate=hf_he.encrypted_generate, client=client)

The client decrypts the logits of each next token and everything after that is transformers' own: logits processors, greedy choice or sampling with
temperature, top-k and top-p, stopping criteria.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from hf_he.client import InferenceServer, Progress
from hf_he.errors import GenerationError, ModelMismatchError, ParameterError
from hf_he.generation.client import GenerationClient
from hf_he.generation.messages import CLIENT, SERVER


@torch.no_grad()
def encrypted_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    client: GenerationClient,
    server: InferenceServer | None = None,
    token_streamer: BaseStreamer | None = None,
    progress: Progress | None = None,
    select: str = CLIENT,
    **model_kwargs: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Prompts [B', L], padded on the left if at all, and the tokens chosen after them: [B', L + new].

    `server` takes the place of `client.server`. `token_streamer`: a TextStreamer or the like; transformers does not hand `streamer` to custom generation.
    `select="server"`: the server takes the most likely token itself, by an encrypted argmax, and goes on with it; the client learns which it was.
    The generation stays available as `client.last`, its cache on the server. `num_return_sequences` fill as many sequence lanes. A sequence that has ended
    is sent its last token again instead of padding, which training may never have seen.

    Raises ModelMismatchError when `client` was made for another vocabulary, ParameterError for beams, GenerationError, before anything is encrypted, for
    more new tokens than the cache has room for, and the errors of `GenerationClient.begin` and `Generation.step`.
    """
    if model.config.vocab_size != client.model.config.vocab_size or model.config.model_type != client.model.config.model_type:
        raise ModelMismatchError("the client was made for another model: build both from one folder")
    if select == SERVER and (generation_config.do_sample or len(logits_processor) or len(input_ids) > 1):
        raise ParameterError(
            "the server picks the most likely token of one prompt: leave sampling, logits processors and other prompts out, or select='client'"
        )
    if generation_config.num_beams > 1:
        raise ParameterError("encrypted generation has no beam search: each beam would need its own cache; use num_beams=1")
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    rows = [row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)]
    longest, new = max(map(len, rows)), generation_config.max_length - input_ids.shape[1]
    room = client.max_tokens - longest + 1
    if new > room >= 1:
        raise GenerationError(
            f"{new} new tokens after a prompt of {longest} do not fit the cache of {client.max_tokens}: use max_new_tokens={room} at most, "
            f"or max_tokens={longest + new - 1} on client and server"
        )
    generation = client.begin([row.tolist() for row in rows], server, progress, select)
    if token_streamer is not None:
        token_streamer.put(input_ids)
    unfinished, sent = torch.ones(len(rows), dtype=torch.long), torch.stack([row[-1] for row in rows])
    scores: list[torch.Tensor] = []
    raw: list[torch.Tensor] = []
    while True:
        logits = torch.from_numpy(generation.logits).to(torch.float32)
        processed = logits_processor(input_ids, logits)
        raw.append(logits)
        scores.append(processed)
        if select == SERVER:
            tokens = torch.tensor([generation.chosen])
        elif generation_config.do_sample:
            tokens = torch.multinomial(processed.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = processed.argmax(-1)
        if generation_config._pad_token_tensor is not None:
            tokens = tokens * unfinished + generation_config._pad_token_tensor * (1 - unfinished)
        sent = torch.where(unfinished.bool(), tokens, sent)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if token_streamer is not None:
            token_streamer.put(tokens)
        unfinished = unfinished & ~stopping_criteria(input_ids, tuple(scores)).long()
        if not unfinished.any():
            break
        generation.step(sent.tolist(), progress)
    if token_streamer is not None:
        token_streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=tuple(scores) if generation_config.output_scores else None,
        logits=tuple(raw) if generation_config.output_logits else None,
    )
