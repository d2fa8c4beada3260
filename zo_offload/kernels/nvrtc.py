"""Compiles the CUDA kernels at run time, for an installation that was built without nvcc.

torch's CUDA wheels contain NVRTC, NVIDIA's run-time compiler, so the versions match. It compiles to machine code for
this GPU (a CUBIN), not to PTX: PTX would need a driver at least as new as the compiler. The result is stored in the
user's cache directory under a name that depends on sources, compiler, options and GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .driver import CudaError

SOURCES = ("cuda.cu", "cuda_kernels.h", "cuda_formats.h", "fused.h", "api.h", "formats.h", "noise.h")
_DIGEST = 32  # bytes of SHA-256 before an image in the cache
# __CUDACC_RTC__ code does not include host headers, so it needs no other options
OPTIONS = ("--std=c++17", "--fmad=true")


def source_dir() -> Path | None:
    """csrc: next to the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parent.parent
    return next((folder for folder in (here / "csrc", here.parent / "csrc") if (folder / "cuda.cu").exists()), None)


def find_library() -> Path | None:
    """libnvrtc: ZO_NVRTC; else torch's, or a conda environment's, or a toolkit's, or one that the system's loader
    finds."""
    if "ZO_NVRTC" in os.environ:
        return Path(os.environ["ZO_NVRTC"])
    names = ("libnvrtc.so.[0-9]*", "libnvrtc-*.so.[0-9]*")  # the second is its name in torch's conda builds
    found = (p for root in _places() for name in names for p in sorted(root.glob(name)) if ".alt." not in p.name)
    return next(found, None) or _of_the_loader()


def _places() -> Iterator[Path]:
    """Folders that may contain it, the most likely to match torch first."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec is not None else []:
        # nvidia/cu13/lib since CUDA 13, the newest first; nvidia/cuda_nvrtc/lib before
        yield from (*sorted(Path(place).glob("cu[0-9]*/lib"), reverse=True), Path(place, "cuda_nvrtc", "lib"))
    torch = importlib.util.find_spec("torch")
    if torch is not None and torch.origin is not None:
        yield Path(torch.origin).parent / "lib"
    roots = [os.environ.get(name) for name in ("CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH")]
    for root in [*filter(None, roots), sys.prefix, "/usr/local/cuda"]:
        yield from (Path(root, folder) for folder in ("lib", "lib64", "targets/x86_64-linux/lib"))
        yield Path(root, "targets/sbsa-linux/lib")


def _of_the_loader() -> Path | None:
    """The newest libnvrtc that the system's loader finds."""
    for major in (13, 12, 11):
        try:
            library = ctypes.CDLL(f"libnvrtc.so.{major}")
        except OSError:
            continue
        return _path_of(library) or Path(f"libnvrtc.so.{major}")
    return None


def _path_of(library: ctypes.CDLL) -> Path | None:
    """The file that a library was loaded from (dladdr of one of its functions)."""

    class Info(ctypes.Structure):
        _fields_ = (
            ("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("symbol", ctypes.c_char_p), ("at", ctypes.c_void_p),
        )  # fmt: skip

    info = Info()
    address = ctypes.cast(library.nvrtcVersion, ctypes.c_void_p)
    found = getattr(ctypes.CDLL(None), "dladdr", lambda *_: 0)(address, ctypes.byref(info))
    return Path(os.fsdecode(info.file)) if found and info.file else None


class Nvrtc:
    """One libnvrtc. `compile` gives a CUBIN ("sm_90") or PTX ("compute_90")."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # NVRTC loaded by path finds its builtins library only if that is already in the process
        for builtins in sorted(path.parent.glob("libnvrtc-builtins*.so*")):
            if ".alt." in builtins.name:  # belongs to the other build of NVRTC in the same folder
                continue
            try:
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue  # one of several is enough; the compiler reports a missing one
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

    def compile(self, sources: dict[str, str], arch: str, more: Sequence[str] = ()) -> bytes:
        """sources: file name -> text; the first is compiled and includes the others by name."""
        (name, text), *headers = sources.items()
        program, count = ctypes.c_void_p(), len(headers)
        texts = (ctypes.c_char_p * count)(*(body.encode() for _, body in headers))
        names = (ctypes.c_char_p * count)(*(file.encode() for file, _ in headers))
        code = self._lib.nvrtcCreateProgram(
            ctypes.byref(program), text.encode(), name.encode(), count, texts, names
        )  # fmt: skip
        self._check(code, "nvrtcCreateProgram")
        try:
            options = [f"--gpu-architecture={arch}", *OPTIONS, *more]
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
    """The kernels' sources; CudaError if they are not installed."""
    folder = source_dir()
    if folder is None:
        raise CudaError("the CUDA sources (csrc/cuda.cu) are not beside this package: install it from a checkout")
    return {name: (folder / name).read_text() for name in SOURCES}


def cache_dir() -> Path | None:
    """The cache of compiled kernels; None for a user without a home, as in containers with an arbitrary uid."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "zo_offload"
    try:
        return Path.home() / ".cache" / "zo_offload"
    except RuntimeError:
        return None


def _kept(path: Path) -> bytes | None:
    """The image in the cache, if it is complete and owned by this user: its code will run on the GPU."""
    try:
        found = path.stat(follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            return None
        digest, image = (data := path.read_bytes())[:_DIGEST], data[_DIGEST:]
    except OSError:
        return None
    return image if hashlib.sha256(image).digest() == digest else None


def _keep(path: Path, image: bytes) -> None:
    """Write image and digest, whole or not at all. OSError if this fails."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(hashlib.sha256(image).digest() + image)
    os.replace(file.name, path)


def compiled(arch: str, only: str | None = None, say: Callable[[str], None] = lambda line: None) -> tuple[bytes, str]:
    """(CUBIN for arch such as "sm_90", its origin). Compiles at most once per machine; CudaError if it cannot.

    only: the storage format whose kernels the image contains; "": those of no format; None: all. say: called before
    compiling, which takes seconds.
    """
    path = find_library()
    if path is None:
        raise CudaError(
            "no NVRTC found: torch's CUDA wheels bring it (nvidia-cuda-nvrtc), conda has cuda-nvrtc, and ZO_NVRTC can "
            "name one. Or build with nvcc: python setup.py build_ext --inplace"
        )
    compiler, sources = Nvrtc(path), read_sources()
    more = [] if only is None else ["--define-macro=ZO_ONE_FORMAT", f"--define-macro=ZO_WANT_{only}=1"]
    what = (compiler.version, arch, OPTIONS, more, sorted(sources.items()))
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:24]
    folder, label = cache_dir(), f"NVRTC {compiler.version[0]}.{compiler.version[1]}"
    cached = None if folder is None else folder / f"cuda-{arch}-{key}.cubin"
    if cached is not None and (image := _kept(cached)) is not None:
        return image, f"{label}, cached in {cached}"
    say(f"compiling the CUDA kernels{f' of {only}' if only else ''} for {arch} with {label}: some seconds, once")
    image = compiler.compile(sources, arch, more)
    if cached is None:
        return image, f"{label}, not cached (no home directory; XDG_CACHE_HOME can name one)"
    try:
        _keep(cached, image)
    except OSError as error:
        return image, f"{label}, not cached ({error})"
    return image, f"{label}, cached in {cached}"
