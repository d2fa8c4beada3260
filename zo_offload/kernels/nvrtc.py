"""The CUDA kernels compiled on the spot, for an installation that was built without nvcc.

torch's CUDA wheels bring NVRTC, NVIDIA's run-time compiler, so the versions match by construction. It is asked for
machine code of this GPU (a CUBIN), not for PTX: PTX would need a driver at least as new as the compiler. The result is
kept in the user's cache directory under a name that covers sources, compiler, options and GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

from .driver import CudaError

SOURCES = ("cuda.cu", "cuda_kernels.h", "cuda_formats.h", "fused.h", "api.h", "formats.h", "noise.h")
# __CUDACC_RTC__ code sees no host, so these are all the options there are
OPTIONS = ("--std=c++17", "--fmad=true")


def source_dir() -> Path | None:
    """csrc: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent.parent
    return next((folder for folder in (here / "csrc", here.parent / "csrc") if (folder / "cuda.cu").exists()), None)


def find_library() -> Path | None:
    """libnvrtc: ZO_NVRTC, else the one that came with torch."""
    if "ZO_NVRTC" in os.environ:
        return Path(os.environ["ZO_NVRTC"])
    roots: list[Path] = []
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        # nvidia/cu13/lib since CUDA 13, the newest first; nvidia/cuda_nvrtc/lib before
        roots += [*sorted(Path(place).glob("cu[0-9]*/lib"), reverse=True), Path(place, "cuda_nvrtc", "lib")]
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        roots.append(Path(torch.origin).parent / "lib")
    names = ("libnvrtc.so.[0-9]*", "libnvrtc-*.so.[0-9]*")  # the second is how torch's conda builds call it
    found = (p for root in roots for name in names for p in sorted(root.glob(name)) if ".alt." not in p.name)
    return next(found, None)


class Nvrtc:
    """One libnvrtc. `compile` gives a CUBIN ("sm_90") or PTX ("compute_90")."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # loaded by path, NVRTC does not find its own second half unless that is in the process already
        for builtins in sorted(path.parent.glob("libnvrtc-builtins*.so*")):
            if ".alt." in builtins.name:  # of the other build of NVRTC that lies beside it
                continue
            try:
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue  # of several, one is enough; the compiler names what it lacks
        try:
            self._lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise CudaError(f"{path} cannot be loaded: {error}") from None
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)

    def _check(self, code: int, what: str, log: str = "") -> None:
        if code:
            text = (self._lib.nvrtcGetErrorString(code) or b"?").decode()
            raise CudaError(f"NVRTC ({self.path.name}), {what}: {text}{': ' + log if log else ''}", code)

    def compile(self, sources: dict[str, str], arch: str) -> bytes:
        """sources: file name -> text, the first is compiled and includes the others by name."""
        (name, text), *headers = sources.items()
        program, count = ctypes.c_void_p(), len(headers)
        texts = (ctypes.c_char_p * count)(*(body.encode() for _, body in headers))
        names = (ctypes.c_char_p * count)(*(file.encode() for file, _ in headers))
        code = self._lib.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), name.encode(), count, texts, names
        )  # fmt: skip
        self._check(code, "nvrtcCreateProgram")
        try:
            options = [f"--gpu-architecture={arch}", *OPTIONS]
            listed = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            code = self._lib.nvrtcCompileProgram(program, len(options), listed)
            self._check(code, f"compiling {name} for {arch}", self._log(program) if code else "")
            return self._result(program, "PTX" if arch.startswith("compute") else "CUBIN")
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self._lib.nvrtcGetProgramLog(program, log)
        return log.value.decode(errors="replace")[:2000]

    def _result(self, program: ctypes.c_void_p, kind: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)), kind)
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{kind}")(program, data), kind)
        return data.raw


def read_sources() -> dict[str, str]:
    """The kernels' sources; CudaError if they did not come along."""
    folder = source_dir()
    if folder is None:
        raise CudaError("the CUDA sources (csrc/cuda.cu) are not beside this package: install it from a checkout")
    return {name: (folder / name).read_text() for name in SOURCES}


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zo_offload"


def compiled(arch: str) -> tuple[bytes, str]:
    """(CUBIN for arch such as "sm_90", where it came from). Compiles at most once a machine; CudaError says why not."""
    path = find_library()
    if path is None:
        raise CudaError(
            "no NVRTC found: torch's CUDA wheels bring it (nvidia-cuda-nvrtc). Or build with nvcc: "
            "python setup.py build_ext --inplace"
        )
    compiler, sources = Nvrtc(path), read_sources()
    key = hashlib.sha256(repr((compiler.version, arch, OPTIONS, sorted(sources.items()))).encode()).hexdigest()[:24]
    cached = cache_dir() / f"cuda-{arch}-{key}.cubin"
    label = f"NVRTC {compiler.version[0]}.{compiler.version[1]}"
    if cached.exists():
        return cached.read_bytes(), f"{label}, cached in {cached}"
    image = compiler.compile(sources, arch)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as file:
            file.write(image)
        os.replace(file.name, cached)  # a reader sees a whole file or none
    except OSError as error:
        return image, f"{label}, not cached ({error})"
    return image, f"{label}, cached in {cached}"
