"""Python operators without an encrypted form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_he.tensor import EncryptedTensor, unsupported

# torch's own operators turn a TypeError of __torch_function__ into NotImplemented, which would lose the reason.
# fmt: off
_REFUSED_OPERATORS = [
    "sub", "rsub", "isub", "truediv", "rtruediv", "itruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul",
    "and", "rand", "or", "ror", "xor", "rxor", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert",
    "iadd", "imul", "bool", "float", "int", "index", "len", "iter", "contains", "setitem",
]
# fmt: on


def _refusal(name: str) -> Callable:
    def operator(self: EncryptedTensor, *args: Any) -> Any:
        raise unsupported(operator)

    operator.__qualname__ = operator.__name__ = f"torch.Tensor.__{name}__"
    return operator


for _name in _REFUSED_OPERATORS:
    setattr(EncryptedTensor, f"__{_name}__", _refusal(_name))
