"""BCC, which compiles the BPF programs.

Only what is about to compile imports it: it brings LLVM into the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peercredd import hooks
from peercredd.compiled import Compiled, Instructions
from peercredd.libbpf import KernelError, shape_of, types_of


class Refused(KernelError):  # noqa: N818 - by the compiler, or by the kernel's verifier
    """A program was not compiled, or not loaded. `log` is all that was said about it."""

    def __init__(self, what: str, log: str) -> None:
        super().__init__(errno.EINVAL, f"{what}: {summary(log)}")
        self.log = log


def version() -> str:
    """Of BCC; empty where there is none."""
    found = find_spec("bcc")
    if not found or not found.origin:
        return ""
    told = Path(found.origin).with_name("version.py")
    return told.read_text() if told.exists() else found.origin


def compiled_by_bcc(text: str, flags: list[str], headers: Path) -> Any:
    """BCC's own object of a compiled source.

    Args:
        text: the source, in one piece.
        flags: for clang.
        headers: what stands in for those of the kernel.

    Raises:
        KernelError: BCC is not installed.
        Refused: the compiler has objections.
    """
    os.environ["BCC_KERNEL_SOURCE"] = str(headers)
    try:
        from bcc import BPF
    except ImportError as error:
        raise KernelError(
            errno.ENOENT,
            f"BCC cannot be imported ({error}); install the package python3-bpfcc and run "
            "peercredd from an environment made by /usr/bin/python3 -m venv --system-site-packages",
        ) from error

    class Source(BPF):  # type: ignore[misc]
        def _trace_autoload(self) -> None:
            """Attach nothing: that is done in an order, and with errors that say why."""

    with _messages() as messages:
        try:
            return Source(text=text.encode(), cflags=flags)
        except Exception as error:
            raise Refused("BCC cannot compile the BPF programs", messages()) from error


def compile_programs(
    text: str, flags: list[str], headers: Path, programs: Iterable[hooks.Program | hooks.Traced]
) -> Compiled:
    """Compile these programs, and what they refer to, out of a source.

    Raises:
        KernelError: BCC is not installed.
        Refused: the compiler has objections.
    """
    bcc = compiled_by_bcc(text, flags, headers)
    from bcc import lib

    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    maps, types_id = {}, 0
    names: dict[int, str] = {}
    for number in range(lib.bpf_num_tables(bcc.module)):
        name = lib.bpf_table_name(bcc.module, number).decode()
        descriptor = lib.bpf_table_fd_id(bcc.module, number)
        names[descriptor] = name
        maps[name], types = shape_of(descriptor)
        types_id = types_id or types
    return Compiled(
        types_of(types_id),
        maps,
        {
            program.name: Instructions.of(_code(lib, bcc.module, program), names)
            for program in programs
        },
    )


def _code(lib: Any, module: Any, program: hooks.Program | hooks.Traced) -> bytes:
    name = program.name.encode()
    if isinstance(program, hooks.Traced):
        # BCC's KFUNC_PROBE and KRETFUNC_PROBE name it differently by release.
        functions = (lib.bpf_function_name(module, i) for i in range(lib.bpf_num_functions(module)))
        name = next(each for each in functions if each.endswith(b"__" + name))
    return ctypes.string_at(
        lib.bpf_function_start(module, name), lib.bpf_function_size(module, name)
    )


@contextmanager
def _messages() -> Iterator[Callable[[], str]]:
    """What clang writes to standard error meanwhile, as a function."""
    # In memory: a full disk is no reason not to capture.
    with open(os.memfd_create("messages"), "w+b") as log:
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)

        def read() -> str:
            log.seek(0)
            return log.read().decode(errors="backslashreplace")

        try:
            yield read
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def summary(log: str) -> str:
    """The line of a compiler's or verifier's log that says what is wrong."""
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    if errors:
        return errors[0]
    verdicts = [line for line in lines if not line.startswith(("processed ", "0:", "HINT"))]
    return verdicts[-1] if verdicts else "no message"
