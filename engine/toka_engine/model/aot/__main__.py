"""`python -m toka_engine.model.aot OUT_DIR`: build the kernels that the engine needs. Takes a compiler, no GPU.

Each kernel appears in OUT_DIR whole or not at all, and what is there is not built again. The engine finds it by
TOKA_KERNELS_DIR=OUT_DIR. Progress goes to stderr; the exit codes are those of `toka`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from toka_engine.errors import REASONS, ConfigError, TokaError
from toka_engine.model.cuda import flashinfer_modules, toolchain
from toka_engine.model.cuda.flashinfer_modules import Kind
from toka_engine.model.folders import check_writable
from toka_engine.output import run_command

_ARCHITECTURE = re.compile(r"(?P<major>[1-9][0-9]?)\.(?P<minor>[0-9])[af]?")
_TRITON = "triton"
"""The kind that stands for all of our own kernels, besides the kinds of flashinfer's modules."""


def build(out_dir: Path, architecture: str, kinds: Sequence[str], head_dims: Sequence[int]) -> None:
    """Build kernels for one architecture, of which there can be one per process.

    Raises ConfigError, DeviceUnavailableError (the compiler is missing or fails), StorageError.
    """
    match = _ARCHITECTURE.fullmatch(architecture)
    if match is None:
        raise ConfigError(f"--architectures {architecture}: not a compute capability, as 8.0 or 9.0a")
    needed = [kind for kind in flashinfer_modules.list_kinds(int(match["major"])) if kind in kinds]
    check_writable(out_dir, "the folder")
    if needed:
        _build_modules(out_dir, architecture, needed, head_dims)
    if _TRITON in kinds:
        # Imported only here: it takes most of the engine, and the image builds flashinfer's modules without.
        from toka_engine.model.aot import triton_build

        triton_build.build(out_dir, int(match["major"]) * 10 + int(match["minor"]), triton_build.list_shapes(head_dims))


def _build_modules(out_dir: Path, architecture: str, kinds: Sequence[Kind], head_dims: Sequence[int]) -> None:
    with tempfile.TemporaryDirectory(prefix=".building-", dir=out_dir) as temporary:
        os.environ["FLASHINFER_CUDA_ARCH_LIST"] = architecture
        os.environ[flashinfer_modules.WORKSPACE_VARIABLE] = temporary
        toolchain.prepare_build(Path(temporary) / "links")
        table = [(kind, head_dim) for kind in kinds for head_dim in head_dims]
        for number, (kind, head_dim) in enumerate(table, start=1):
            began_s = time.monotonic()
            title = f"{number}/{len(table)} {kind} head_dim={head_dim} architecture={architecture}"
            print(f"{title}: building, {os.environ['MAX_JOBS']} at a time", file=sys.stderr, flush=True)
            library, is_new = _build_module(out_dir, kind, head_dim)
            took = f"{time.monotonic() - began_s:.0f} s" if is_new else "there already"
            print(f"{title}: {took}, {library.stat().st_size / 1e6:.1f} MB", file=sys.stderr, flush=True)


def _build_module(out_dir: Path, kind: Kind, head_dim: int) -> tuple[Path, bool]:
    """Return the library, and whether it had to be built."""
    with flashinfer_modules.described(kind, head_dim):
        spec = flashinfer_modules.generate(kind, head_dim)
        library = flashinfer_modules.library_in(flashinfer_modules.folder_of(out_dir), spec.name)
        if library.exists():
            return library, False
        spec.build(verbose=False)
        library.parent.mkdir(parents=True, exist_ok=True)
        spec.jit_library_path.rename(library)
        return library, True


def _build_each(arguments: argparse.Namespace) -> None:
    """Start one process per architecture, because flashinfer reads it once."""
    for architecture in arguments.architectures:
        command = [sys.executable, "-m", "toka_engine.model.aot", str(arguments.out_dir)]
        command += ["--architectures", architecture, "--kinds", *arguments.kinds]
        command += ["--head-dims", *map(str, arguments.head_dims)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            sys.exit(done.returncode)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toka_engine.model.aot", description=(__doc__ or "").split(": ", 1)[1]
    )
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument(
        "--architectures", nargs="+", default=flashinfer_modules.BUILT_ARCHITECTURES, metavar="A", help="as 8.0 9.0a"
    )
    parser.add_argument(
        "--head-dims",
        nargs="+",
        type=int,
        choices=flashinfer_modules.HEAD_DIMS,
        default=flashinfer_modules.BUILT_HEAD_DIMS,
    )
    all_kinds = (*map(str, Kind), _TRITON)
    parser.add_argument("--kinds", nargs="+", choices=all_kinds, default=all_kinds)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    parsed = _parse(arguments)
    try:
        if len(parsed.architectures) > 1:
            _build_each(parsed)
        else:
            build(parsed.out_dir.absolute(), parsed.architectures[0], parsed.kinds, parsed.head_dims)
    except TokaError as error:
        print(f"error: {REASONS[error.exit_code]}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
