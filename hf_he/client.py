"""The client: tokenizer, embeddings and the secret key. Text goes in, encrypted batches go out, labels come back.

client = Client.from_pretrained(directory)
keys = client.keygen()
server = Server(directory, keys.evaluation)          # or hf_he.connect("http://127.0.0.1:8765")
result = client.infer(server, ["an unexpected delight", "two hours I will not get back"])
print(result.labels)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from hf_he.backends import Ciphertext, HEBackend, get_backend
from hf_he.checkpoints import load_classifier, load_tokenizer, model_fingerprint
from hf_he.ckks.parameters import parameter_set
from hf_he.errors import CorruptFileError, DataError, ParameterError, RangeError, RefreshError, WrongKeyError
from hf_he.flooding import flood
from hf_he.handlers.attention import mask_power
from hf_he.keys import Keys
from hf_he.packing import Packing, pack_attention_mask, pack_embeddings, unpack_logits
from hf_he.planner import PackingChoice, Plan, choose_packing, make_plans, packing_widths
from hf_he.protocol import SEQUENCE_LENGTH, EncryptedBatch, EncryptedResult, Identity, max_batches, widest_batch
from hf_he.refresh import LARGEST_REFRESH
from hf_he.results import InferenceResult, Sentence, merge_reports

DEFAULT_PARAMETERS = "n14"
BOOTSTRAPPING_PARAMETERS = "n16-bootstrap"
MAX_REFRESHES_PER_BATCH = 256
_CIPHERTEXTS_PER_MESSAGE = 128
"""Of an input that is sent in several messages; at least one packed batch."""

_REFERENCE_BATCH = 32
_EXACT_BITS = 51
"""Encoding takes one path, and one time, for coefficients below 2^52; this leaves a bit for noise."""

Progress = Callable[[dict[str, Any]], None]


class InferenceServer(Protocol):
    """What `Client.infer` needs: `hf_he.Server` here, or `hf_he.connect(url)` for another process."""

    def infer(self, data: bytes, refresh: Callable[[bytes], bytes], progress: Progress | None = None) -> bytes: ...


class Refresher:
    """Decrypts a ciphertext, encrypts its values afresh at the top level, and lets nothing else out.

    Whether and how it answers depends on what the server knows already: the bytes of the request and the number of requests before. Values
    beyond `bound` are clipped and reported by `check` when the server is done, because an error at once, or a slower encoding, would
    tell whoever chose the ciphertext something about the secret key.
    """

    def __init__(self, backend: HEBackend, keys: Keys, requests: int, widest: int) -> None:
        self.bound = 2.0 ** (_EXACT_BITS - backend.parameters.scale_bits)
        self.clipped = 0
        self._backend, self._keys, self._widest = backend, keys, widest
        self._allowed = self._remaining = requests

    def __call__(self, data: bytes) -> bytes:
        """Ciphertext bytes to ciphertext bytes. Raises RefreshError, WrongKeyError, ParameterError or CorruptFileError."""
        if self._remaining == 0:
            raise RefreshError(f"the server asked for more than {self._allowed} refreshes in one inference: do not trust it, or report a bug")
        self._remaining -= 1
        ciphertext = self._backend.deserialize(data, "ciphertext")
        if not 1 <= ciphertext.count <= self._widest:
            raise RefreshError(f"the server asked to refresh {ciphertext.count} ciphertexts at once, this model needs at most {self._widest}: do not trust it")
        return self._backend.serialize(self._backend.encrypt(self.decrypted(ciphertext), self._keys.secret))

    def decrypted(self, ciphertext: Ciphertext) -> np.ndarray:
        """The values of a ciphertext that the server chose, those beyond `bound` clipped and reported by `check`."""
        values = self._backend.decrypt(ciphertext, self._keys.secret)
        self.clipped += not (np.abs(values) <= self.bound).all()
        return np.clip(np.nan_to_num(values, nan=0.0), -self.bound, self.bound)

    def check(self) -> None:
        """Raise RangeError when a value had to be clipped."""
        if self.clipped:
            raise RangeError(
                f"{self.clipped} refreshed ciphertexts held values beyond {self.bound:g}, so the result is wrong: "
                "calibrate the model's ranges on your data, or do not trust the server"
            )


class Client:
    """Encrypts sentences for one model, answers refresh requests, decrypts logits.

    `directory` holds the model and its tokenizer; `keys` a key folder or Keys (its backend and parameters are then used). The plaintext
    polynomial model serves two purposes on this side: computing embeddings, and refusing sentences whose values would leave a fitted
    range before anything is encrypted.

    `features`: per ciphertext; 1 is for batches of hundreds of sentences, None leaves it to the planner, batch by batch (`choose`). `packing` is the
    one of few sentences, which training uses. Raises ParameterError for features that the model cannot be packed with.
    """

    def __init__(self, directory: str | Path, backend: HEBackend, keys: Keys | None = None, features: int | None = None) -> None:
        self.directory = Path(directory)
        self.backend = backend
        self.model = load_classifier(directory).double()
        self.tokenizer = load_tokenizer(self.directory)
        self.model_fingerprint = model_fingerprint(directory)
        widths = packing_widths(self.model.config)
        self.packings = {width: Packing.fit(backend.parameters.slots, width, SEQUENCE_LENGTH) for width in widths}
        self.packing = self.packings[widths[0]]
        if features not in (None, *widths):
            raise ParameterError(f"this model is packed with {' or '.join(map(str, widths))} features per ciphertext, not {features}")
        self.features = features
        self.keys: Keys | None = None
        if keys is not None:
            self.use_keys(keys)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        backend: str = "auto",
        parameters: str = DEFAULT_PARAMETERS,
        keys: Keys | str | Path | None = None,
        features: int | None = None,
    ) -> Client:
        """A client for the model in `directory`; with `keys`, backend and parameters are those the keys were made for."""
        if keys is None:
            return cls(directory, get_backend(backend, parameter_set(parameters)), features=features)
        keys = keys if isinstance(keys, Keys) else Keys.load(keys)
        return cls(directory, keys.backend, keys, features)

    def use_keys(self, keys: Keys) -> None:
        if keys.backend.name != self.backend.name or keys.backend.parameters.fingerprint != self.backend.parameters.fingerprint:
            raise ParameterError(f"these keys are for the {keys.backend.name} backend or for other parameters: build the client with keys=... instead")
        self.keys = keys

    def keygen(self, progress: Callable[[int, int], None] | None = None, *, bootstrapping: bool = False) -> Keys:
        """Fresh keys for exactly the rotations this model needs in any of its packings, and for bootstrapping if asked. `keys.evaluation` is what a
        server gets."""
        rotations: dict[int, int] = {}
        for plan in self._plans.values():
            rotations |= {step: max(level, rotations.get(step, 0)) for step, level in plan.rotations.items()}
        self.use_keys(Keys.generate(self.backend, rotations, progress, bootstrapping=bootstrapping))
        return self._keys

    @cached_property
    def _plans(self) -> dict[Packing, Plan]:
        return make_plans(self.model, self.backend.parameters, SEQUENCE_LENGTH)

    def choose(self, sentences: int, offered: Collection[int] | None = None) -> PackingChoice:
        """How a batch of so many sentences is packed, and why: as `features` of this client say, otherwise by the planner, out of the features per
        ciphertext that a server offers."""
        if self.features is not None:
            packing = self.packings[self.features]
            return PackingChoice(packing, self._plans[packing], {}, f"{self.features} features per ciphertext were asked for")
        plans = {packing: plan for packing, plan in self._plans.items() if offered is None or packing.features in offered}
        return choose_packing(plans or {self.packing: self._plans[self.packing]}, sentences)

    @cached_property
    def mask_power(self) -> int | None:
        """What `pack_attention_mask` has to know of the model's kernel."""
        return mask_power(self.model)

    @property
    def identity(self) -> Identity:
        return Identity(self.backend.name, self.backend.parameters.fingerprint, self.model_fingerprint, self._keys.key_id)

    @property
    def label_names(self) -> dict[int, str]:
        return {int(key): value for key, value in self.model.config.id2label.items()}

    def prepare(self, texts: Sequence[str], labels: Sequence[int] | None = None) -> list[Sentence]:
        """Tokenize, predict in plaintext polynomial mode, and refuse what leaves a fitted range (`Sentence.refused` names the layer)."""
        if labels is not None and len(labels) != len(texts):
            raise DataError(f"{len(labels)} labels for {len(texts)} sentences: give one label per sentence, or none")
        known = [None] * len(texts) if labels is None else [int(label) for label in labels]
        counts = [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]] if texts else []
        prepared = []
        for start in range(0, len(texts), _REFERENCE_BATCH):
            chunk = slice(start, start + _REFERENCE_BATCH)
            for text, label, count, (logits, refused) in zip(texts[chunk], known[chunk], counts[chunk], self._reference(texts[chunk]), strict=True):
                prepared.append(Sentence(text, label, count, count > SEQUENCE_LENGTH, refused, logits))
        return prepared

    def encrypt(self, sentences: Sequence[Sentence], packing: Packing | None = None) -> EncryptedBatch:
        """Encrypt the sentences that were not refused, `packing.sequences` to a packed batch (default: of `choose`); lanes left over hold copies.

        Raises RangeError when every sentence was refused, DataError when there are none or too many for one message.
        """
        accepted = [sentence for sentence in sentences if sentence.refused is None]
        if not accepted:
            if not sentences:
                raise DataError("there are no sentences to encrypt: the input is empty")
            raise RangeError(f"every sentence was refused; the first: {sentences[0].refused}")
        packing = packing or self.choose(len(accepted)).packing
        lanes, most = packing.sequences, max_batches(self.model.config, packing)
        batches = -(-len(accepted) // lanes)
        if batches > most:
            raise DataError(f"{len(accepted)} sentences are more than one message holds ({most * lanes}): split the input")
        embeddings, masks = self.embed([sentence.text for sentence in accepted])
        packed, packed_masks = [], []
        for index in range(batches):
            lane = slice(index * lanes, (index + 1) * lanes)
            packed.append(pack_embeddings(embeddings[lane], packing))
            packed_masks.append(pack_attention_mask(masks[lane], packing, self.mask_power))
        secret = self._keys.secret  # symmetric encryption: less noise, and half of each ciphertext is a seed
        return EncryptedBatch(
            self.identity,
            batches,
            packing.features,
            self.backend.serialize(self.backend.encrypt(np.stack(packed), secret)),
            self.backend.serialize(self.backend.encrypt(np.stack(packed_masks), secret)),
        )

    def refresher(self, batches: int, packing: Packing | None = None) -> Refresher:
        """Answers the refresh requests of one inference over `batches` batches."""
        config, packing = self.model.config, packing or self.packing
        messages = -(-packing.blocks(config.hidden_size) // LARGEST_REFRESH)
        return Refresher(self.backend, self._keys, MAX_REFRESHES_PER_BATCH * batches * messages, widest_batch(config, packing))

    def decrypt(self, result: EncryptedResult, sentences: Sequence[Sentence], flooding: float = 0.0) -> list[Sentence]:
        """The sentences with their decrypted logits; refused ones pass through. Raises the typed errors of a result that does not fit.

        With `flooding`, Gaussian noise of this deviation is added (hf_he.flooding): without it, logits are for this client's eyes only.
        """
        result.identity.check(self.identity, "encrypted result")
        accepted = sum(sentence.refused is None for sentence in sentences)
        packing = self._packing_of(result)
        lanes = packing.sequences
        if result.batches != -(-accepted // lanes):
            raise CorruptFileError(f"the result holds {result.batches} batches, {accepted} sentences need {-(-accepted // lanes)}: it answers another input")
        ciphertext = self.backend.deserialize(result.logits, "ciphertext")
        if ciphertext.key_id != self._keys.key_id:
            raise WrongKeyError(f"the logits belong to key {ciphertext.key_id}, not {self._keys.key_id}: decrypt with the keys they were encrypted for")
        if ciphertext.batch_shape[:1] != (result.batches,):
            raise CorruptFileError(f"the result's ciphertext has shape {ciphertext.batch_shape} for {result.batches} batches: run the inference again")
        slots = self.backend.decrypt(ciphertext, self._keys.secret)
        logits = np.concatenate([unpack_logits(batch, packing, self.model.config.num_labels) for batch in slots])
        if not np.isfinite(logits).all():
            raise CorruptFileError("the result decrypts to numbers that are not finite (its scale is wrong): run the inference again")
        rows = iter(flood(logits, flooding) if flooding else logits)
        return [s if s.refused is not None else s.with_logits(next(rows)) for s in sentences]

    def infer(self, server: InferenceServer, texts: Sequence[str], labels: Sequence[int] | None = None, progress: Progress | None = None) -> InferenceResult:
        """`prepare`, then `classify`."""
        return self.classify(server, self.prepare(texts, labels), progress)

    def classify(self, server: InferenceServer, sentences: Sequence[Sentence], progress: Progress | None = None) -> InferenceResult:
        """Encrypt prepared sentences, run them on the server while answering its refresh requests, decrypt.

        Large inputs go in several messages of at most 128 ciphertexts, or one packed batch, each. They are packed as suits their number, and the server.
        """
        packing = self.choose(sum(sentence.refused is None for sentence in sentences), _offered(server)).packing
        lanes, each = packing.sequences, max(1, _CIPHERTEXTS_PER_MESSAGE // (packing.blocks(self.model.config.hidden_size) + 1))
        total = -(-sum(sentence.refused is None for sentence in sentences) // lanes)
        seconds, sizes = {"encrypt": 0.0, "decrypt": 0.0}, {"ciphertext_in": 0, "ciphertext_out": 0}
        decrypted, reports = [], []
        for index, part in enumerate(_parts(sentences, lanes * each)):
            start = time.perf_counter()
            batch = self.encrypt(part, packing)
            data = batch.to_bytes()
            seconds["encrypt"] += time.perf_counter() - start
            result = self.run(server, batch, data, _shifted(progress, index * each, total))
            start = time.perf_counter()
            decrypted += self.decrypt(result, part)
            seconds["decrypt"] += time.perf_counter() - start
            sizes["ciphertext_in"] += len(data)
            sizes["ciphertext_out"] += len(result.logits)
            reports.append(result.report)
        return InferenceResult(decrypted, merge_reports(reports), self.label_names, seconds, sizes)

    def run(self, server: InferenceServer, batch: EncryptedBatch, data: bytes | None = None, progress: Progress | None = None) -> EncryptedResult:
        """Only the server's part: send an encrypted batch, answer refresh requests, return the checked encrypted result.

        Raises RangeError, once the server is done, when a refreshed value was out of bounds.
        """
        batch.identity.check(self.identity, "encrypted batch")
        refresher = self.refresher(batch.batches, self._packing_of(batch))
        answer = server.infer(batch.to_bytes() if data is None else data, refresher, progress)
        refresher.check()
        result = EncryptedResult.from_bytes(answer)
        if (result.batch_id, result.batches, result.features) != (batch.batch_id, batch.batches, batch.features):
            raise CorruptFileError("the server answered another batch: run the inference again")
        return result

    def _packing_of(self, message: EncryptedBatch | EncryptedResult) -> Packing:
        if message.features not in self.packings:
            raise CorruptFileError(f"the message holds {message.features} features per ciphertext, which this model is not packed with: encrypt again")
        return self.packings[message.features]

    @property
    def _keys(self) -> Keys:
        if self.keys is None:
            raise WrongKeyError("this client has no keys: call client.keygen(), or pass keys= a folder written by `hf-he keygen`")
        return self.keys

    def _tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(list(texts), truncation=True, max_length=SEQUENCE_LENGTH, padding="max_length", return_tensors="pt"))

    def embed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [n, T, F] and padding masks [n, T] of texts, computed in the clear."""
        tokens = self._tokens(texts)
        with torch.no_grad():
            embeddings = self.model.base_model.embeddings(input_ids=tokens["input_ids"], token_type_ids=tokens.get("token_type_ids"))
        return embeddings.numpy(), tokens["attention_mask"].numpy()

    def _reference(self, texts: Sequence[str]) -> list[tuple[tuple[float, ...] | None, str | None]]:
        """Per text: plaintext polynomial logits, or the reason of refusal."""
        try:
            with torch.no_grad():
                logits = self.model(**self._tokens(texts)).logits
            return [(tuple(row), None) for row in logits.tolist()]
        except RangeError as error:
            if len(texts) == 1:
                return [(None, str(error))]
        return [self._reference([text])[0] for text in texts]


def _offered(server: InferenceServer) -> Collection[int] | None:
    """The features per ciphertext that a server says it takes."""
    describe = getattr(server, "describe", None)
    if describe is None:
        return None
    offered = describe().get("features_per_ciphertext")
    return [width for width in offered if type(width) is int] if isinstance(offered, list) else []


def _parts(sentences: Sequence[Sentence], size: int) -> list[list[Sentence]]:
    """Consecutive parts with at most `size` accepted sentences each; refused ones stay in place, and only a whole input may be refused."""
    parts: list[list[Sentence]] = [[]]
    accepted = 0
    for sentence in sentences:
        if sentence.refused is None:
            accepted += 1
            if accepted > size:
                parts.append([])
                accepted = 1
        parts[-1].append(sentence)
    return parts


def _shifted(progress: Progress | None, offset: int, total: int) -> Progress | None:
    """Progress of one message as progress of the whole input."""
    if progress is None:
        return None
    return lambda event: progress(event | {"batch": event["batch"] + offset, "batches": total} if "batch" in event else event)
