"""Kernels on another architecture: cross-compiled by LLVM, linked here, run by qemu's user-mode emulator. No aarch64 tool is needed but that one.

A kernel is compiled once more without threads (its loops over them run one after another), which is deterministic and gives the same bits.
Reference counts of arrays, which nothing owns here, are left out: numba's use x86 instructions by the time their code can be had.
"""

import os
import re
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from types import FunctionType

import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core.dispatcher import Dispatcher

TRIPLE = "aarch64-unknown-linux-gnu"
_CODE, _DATA, _PAGE = 0x400000, 0x10000000, 0x10000
_RUNTIME = """
define ptr @memset(ptr %to, i32 %value, i64 %size) {
entry:
  %byte = trunc i32 %value to i8
  %none = icmp eq i64 %size, 0
  br i1 %none, label %done, label %loop
loop:
  %i = phi i64 [0, %entry], [%next, %loop]
  %p = getelementptr i8, ptr %to, i64 %i
  store volatile i8 %byte, ptr %p
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, %size
  br i1 %more, label %loop, label %done
done:
  ret ptr %to
}
@_memory = internal global [1048576 x i8] zeroinitializer, align 64
@_used = internal global i64 0
define ptr @NRT_MemInfo_alloc_aligned(i64 %size, i32 %align) {
  %at = load i64, ptr @_used
  %info = getelementptr i8, ptr @_memory, i64 %at
  %data = getelementptr i8, ptr %info, i64 64
  %field = getelementptr i8, ptr %info, i64 24
  store ptr %data, ptr %field
  %end = add i64 %size, 127
  %rounded = and i64 %end, -64
  %next = add i64 %at, %rounded
  store i64 %next, ptr @_used
  ret ptr %info
}
define ptr @NRT_MemInfo_alloc_safe_aligned(i64 %size, i32 %align) {
  %info = call ptr @NRT_MemInfo_alloc_aligned(i64 %size, i32 %align)
  ret ptr %info
}
define i32 @numba_attempt_nocopy_reshape(i64 %nd, ptr %dims, ptr %strides, i64 %newnd, ptr %newdims, ptr %newstrides, i64 %itemsize, i32 %order) {
  store i64 %itemsize, ptr %newstrides
  %flat = icmp eq i64 %newnd, 1
  %done = zext i1 %flat to i32
  ret i32 %done
}
define void @_unresolved() {
  call void @llvm.trap()
  ret void
}
declare void @llvm.trap()
declare i64 @_system(i64, i64, i64, i64)
"""
_SYSTEM = struct.pack("<3I", 0xAA0303E8, 0xD4000001, 0xD65F03C0)
"""_system: mov x8, x3; svc #0; ret."""


def emulator() -> str | None:
    """qemu's aarch64 user-mode emulator, or None."""
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


@cache
def target() -> llvm.TargetMachine:
    """The baseline of the architecture: NEON with fused multiply-add."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(TRIPLE).create_target_machine(cpu="generic", features="+neon", opt=3, reloc="static", codemodel="small")


class CrossKernel:
    """One signature of a kernel (a numba dispatcher), cross-compiled."""

    def __init__(self, kernel, signature) -> None:
        serial = _serial(kernel)
        serial.compile(signature)
        overload = serial.overloads[signature]
        self.name = overload.fndesc.llvm_func_name
        ir = re.sub(r"(?ms)^define [^\n]*(@NRT_(?:in|de)cref)\(.*?^}$", r"define void \1(ptr %x) {\n  ret void\n}", overload.library.get_llvm_str())
        ir = re.sub(r'target triple = ".*"', f'target triple = "{TRIPLE}"', ir)
        self.ir = re.sub(r'target datalayout = ".*"', f'target datalayout = "{target().target_data}"', ir)

    def assembly(self) -> str:
        """The NEON assembly text."""
        return target().emit_assembly(llvm.parse_assembly(self.ir))

    def run(self, arguments: tuple, memory: dict[int, np.ndarray]) -> list[np.ndarray]:
        """All arrays of `arguments`, then of `memory`, after the call. Integers that are keys of `memory`, addresses on this machine, point to its arrays."""
        table, arrays, image, moved = _image(arguments, memory)
        module = llvm.parse_assembly(self.ir)
        types = [str(a.type) for a in module.get_function(self.name).arguments]
        assert len(types) == len(table) + 2
        ir = re.sub(r"(?m)^declare .*@(NRT_MemInfo_alloc(_safe)?_aligned|numba_attempt_nocopy_reshape)\(.*$", "", self.ir)
        executable = _executable(target().emit_object(llvm.parse_assembly(ir + _RUNTIME + _start(self.name, types, len(image)))), image)
        after = _emulate(executable, len(image))
        results = [np.frombuffer(after, a.dtype, a.size, at).reshape(a.shape) for at, a in arrays]
        back = {new: old for old, new in moved.items()}
        return [_translated(a, back) for a in results]


def _serial(kernel: Dispatcher) -> Dispatcher:
    """The kernel, and what it calls, without threads."""
    function = kernel.py_func
    used = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    inner = {name: _serial(value) for name, value in used.items() if isinstance(value, Dispatcher) and value.targetoptions.get("parallel", False)}
    return numba.njit(error_model="numpy", boundscheck=False)(FunctionType(function.__code__, function.__globals__ | inner, function.__name__))


def _start(name: str, types: list[str], size: int) -> str:
    """Entry point: loads the arguments from the image, calls the kernel, writes the image to standard output, exits with the kernel's status."""
    loads = [f"  %a{i} = load {t}, ptr inttoptr (i64 {_DATA + 8 * i} to ptr)" for i, t in enumerate(types[2:])]
    spare = _DATA + 8 * (len(types) - 2)
    passed = [f"{types[0]} inttoptr (i64 {spare} to ptr)", f"{types[1]} inttoptr (i64 {spare + 64} to ptr)", *(f"{t} %a{i}" for i, t in enumerate(types[2:]))]
    return "\n".join(
        [
            "define void @_start() {",
            *loads,
            f"  %status = call i32 @{name}({', '.join(passed)})",
            f"  %written = call i64 @_system(i64 1, i64 {_DATA}, i64 {size}, i64 64)",
            "  %code = zext i32 %status to i64",
            "  %exited = call i64 @_system(i64 %code, i64 0, i64 0, i64 94)",
            "  unreachable",
            "}",
        ]
    )


def _image(arguments: tuple, memory: dict[int, np.ndarray]) -> tuple[list[bytes], list[tuple[int, np.ndarray]], bytes, dict[int, int]]:
    """Eight bytes per flattened argument; (offset, array) of all arrays; the data segment, which begins with the arguments; where `memory` lies."""
    flat = list(_flatten(arguments))
    body, at = bytearray(), 128 + 8 * sum(5 + 2 * x.ndim if isinstance(x, np.ndarray) else 1 for x in flat)

    def place(data: bytes) -> int:
        body.extend(bytes(-(at + len(body)) % 64))
        body.extend(data)
        return at + len(body) - len(data)

    blocks = [(place(array.tobytes()), array) for array in memory.values()]
    moved = {address: _DATA + start for address, (start, _) in zip(memory, blocks, strict=True)}
    table, arrays = [], []
    for x in flat:
        if isinstance(x, np.ndarray):
            start = place(_translated(x, moved).tobytes())
            arrays.append((start, x))
            table += [struct.pack("<q", v) for v in (0, 0, x.size, x.itemsize, _DATA + start, *x.shape, *x.strides)]
        else:
            table.append(struct.pack("<d", x) if isinstance(x, float) else struct.pack("<q", moved.get(int(x), int(x))))
    return table, [*arrays, *blocks], b"".join(table) + bytes(128) + bytes(body), moved


def _translated(x: np.ndarray, addresses: dict[int, int]) -> np.ndarray:
    if x.dtype != np.int64:
        return x
    return np.array([addresses.get(v, v) for v in x.reshape(-1).tolist()], dtype=np.int64).reshape(x.shape)


def _flatten(value):
    if isinstance(value, tuple):
        for item in value:
            yield from _flatten(item)
    else:
        yield value


def _executable(relocatable: bytes, image: bytes) -> bytes:
    """A static executable of one object file, with `image` at _DATA."""
    code, entry = _link(relocatable)
    offsets = (_PAGE, _PAGE + -(-len(code) // _PAGE) * _PAGE)
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, entry, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    segments = b"".join(
        struct.pack("<IIQQQQQQ", 1, 7, offset, address, address, len(data), len(data), _PAGE)
        for offset, address, data in zip(offsets, (_CODE, _DATA), (code, image), strict=True)
    )
    return (header + segments).ljust(_PAGE, b"\0") + code.ljust(offsets[1] - _PAGE, b"\0") + image


def _link(data: bytes) -> tuple[bytes, int]:
    """The allocated sections of an aarch64 ELF object at _CODE, relocated, and the address of `_start`."""
    at, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, at + 64 * i) for i in range(count)]
    symbol_type, relocation_type = 2, 4
    placed, code = {}, bytearray()
    for i, (_, kind, flags, _, offset, size, _, _, align, _) in enumerate(sections):
        if flags & 2:
            code.extend(bytes(-len(code) % max(align, 16)))
            placed[i] = _CODE + len(code)
            code.extend(bytes(size) if kind == 8 else data[offset : offset + size])
    system = _CODE + len(code)
    code.extend(_SYSTEM)
    table = next(s for s in sections if s[1] == symbol_type)
    strings = sections[table[6]][4]
    symbols, addresses, offsets = [], {}, {}
    for o in range(table[4], table[4] + table[5], 24):
        name, _, _, section, value, size = struct.unpack_from("<IBBHQQ", data, o)
        text = data[strings + name : data.index(b"\0", strings + name)].decode()
        if section == 0xFFF2:
            code.extend(bytes(-len(code) % 16))
            address = _CODE + len(code)
            code.extend(bytes(size))
        else:
            address = placed[section] + value if section in placed else system if text == "_system" else None
        symbols.append(address)
        addresses[text] = address
    for section in sections:
        if section[1] == relocation_type and section[7] in placed:
            for o in range(section[4], section[4] + section[5], 24):
                offset, info, addend = struct.unpack_from("<QQq", data, o)
                target_address = symbols[info >> 32] if symbols[info >> 32] is not None else addresses["_unresolved"]
                kind, value = info & 0xFFFFFFFF, target_address + addend
                if kind in (311, 312):
                    if value not in offsets:
                        code.extend(bytes(-len(code) % 8))
                        offsets[value] = _CODE + len(code)
                        code.extend(struct.pack("<Q", value))
                    kind, value = {311: 275, 312: 286}[kind], offsets[value]
                _relocate(code, placed[section[7]] + offset, kind, value)
    return bytes(code), addresses["_start"]


def _relocate(code: bytearray, place: int, kind: int, value: int) -> None:
    """Relocations of the small code model (ELF for the Arm 64-bit Architecture, table 5-6 on)."""
    at = place - _CODE
    if kind in (257, 261):
        struct.pack_into("<q" if kind == 257 else "<i", code, at, value if kind == 257 else value - place)
        return
    word = struct.unpack_from("<I", code, at)[0]
    if kind in (282, 283):
        word |= (value - place) >> 2 & 0x3FFFFFF
    elif kind == 275:
        pages = (value >> 12) - (place >> 12)
        word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    else:
        word |= (value & 0xFFF) >> {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}[kind] << 10
    struct.pack_into("<I", code, at, word)


def _emulate(executable: bytes, size: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel")
        with open(path, "wb") as file:
            file.write(executable)
        os.chmod(path, 0o700)
        with open(os.path.join(folder, "image"), "w+b") as output:
            subprocess.run([emulator(), path], stdout=output, check=True, timeout=300)
            output.seek(0)
            after = output.read()
    assert len(after) == size
    return after
