"""Builds the optional C++ kernels; everything else about the package is in pyproject.toml.

The library is plain C++ against PyTorch's stable ABI (no Python.h), so one wheel serves every Python 3 and
every PyTorch from the one in TARGET on. It is optional: whatever goes wrong, the installation succeeds, one
line says what happened, and `lowbit.backends()` reads the reason from _build_info.json.
"""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import LinkError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

TARGET = "0x020a000000000000"  # PyTorch 2.10: the oldest whose stable ABI has parallel_for
# no contraction into fused multiply-add and no fast-math: kernels equal their definitions bit for bit
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
FLAGS.append("-Wno-uninitialized")  # GCC 12 warns of its own avx512fintrin.h
FLAGS.append(f"-DTORCH_TARGET_VERSION={TARGET}")
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
VNNI = [f"-mavx512{part}" for part in ("vnni", "vbmi", "vbmi2", "bitalg", "vpopcntdq")]
# files with these endings, and only these, use instructions that not every CPU has
ISA_FLAGS = {
    "_avx2": ["-mavx2"],
    "_avx512": AVX512,
    "_avx512vnni": AVX512 + VNNI,
    "_avx512amx": [*AVX512, *VNNI, "-mamx-tile", "-mamx-int8"],
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1", "-g"]
X86 = platform.machine().lower() in ("x86_64", "amd64")

try:
    from torch.utils.cpp_extension import CppExtension

    TORCH_ERROR = None
except Exception as error:  # absent, or present and broken: both mean no kernels
    TORCH_ERROR = (
        f"PyTorch was not importable when lowbit was built ({error}); "
        "install torch, then lowbit with --no-build-isolation"
    )


def extension() -> Extension:
    sources = sorted(path.as_posix() for path in Path("csrc").glob("*.cpp"))
    headers = sorted(path.as_posix() for path in Path("csrc").glob("*.h"))
    options = {"depends": headers, "extra_compile_args": FLAGS, "py_limited_api": True, "optional": True}
    if TORCH_ERROR is not None:
        return Extension("lowbit._C", sources, language="c++", **options)
    made = CppExtension("lowbit._C", sources, **options)
    # error messages name PyTorch's headers, not the folder of the machine that built the wheel
    made.extra_compile_args = FLAGS + [f"-fmacro-prefix-map={folder}/=" for folder in made.include_dirs]
    return made


class BuildFailed(Exception):
    """A reason that reads well by itself."""


class build_kernels(build_ext):
    """Compiles where it can, and records the outcome beside the library."""

    user_options = [*build_ext.user_options, ("sanitize", None, "with the address and undefined-behaviour sanitizers")]
    boolean_options = [*build_ext.boolean_options, "sanitize"]
    reason: str | None = None  # why there are no kernels

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def finalize_options(self) -> None:
        super().finalize_options()
        for ext in self.extensions if self.sanitize else ():
            ext.extra_compile_args += SANITIZE
            ext.extra_link_args += SANITIZE
        self.force = True  # flags, compiler or PyTorch may have changed; the sources compile in seconds

    def run(self) -> None:
        in_place = bool(self.inplace or self.editable_mode)
        for stale in Path("src/lowbit").glob("_C*.so") if in_place else ():
            stale.unlink()  # a library of older sources would be worse than none
        super().run()
        library = self.get_ext_filename("lowbit._C")
        if self.reason is None and not any(Path(root, library).exists() for root in (self.build_lib, "src")):
            self.reason = "the compiler left no library"
        info = {
            "ok": self.reason is None,
            "reason": self.reason,
            "compiler": self.compiler_version(),
            "flags": FLAGS,
            "torch_target": TARGET,
        }
        folder = Path("src/lowbit") if in_place else Path(self.build_lib) / "lowbit"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        print(f"lowbit: C++ kernels {'built' if self.reason is None else 'NOT built: ' + self.reason}")

    def build_extensions(self) -> None:
        self.reason = TORCH_ERROR
        if self.reason is not None:
            return
        compile_one = getattr(self.compiler, "_compile", None)

        def compile_with_isa(obj, src, ext, cc_args, extra_postargs, pp_opts):
            isa = [flag for end, flags in ISA_FLAGS.items() if Path(src).stem.endswith(end) for flag in flags]
            try:
                compile_one(obj, src, ext, cc_args, [*extra_postargs, *(isa if X86 else [])], pp_opts)
            except Exception as error:
                name = self.compiler_name()
                raise BuildFailed(f"{name} could not compile {src}; pip -v shows why") from error

        try:
            if self.compiler.compiler_type != "unix":
                raise BuildFailed(f"{self.compiler.compiler_type} is not supported, GCC and Clang are")
            self.compiler._compile = compile_with_isa
            for ext in self.extensions:
                ext.optional = False  # so that a failure arrives here, with its reason
                try:
                    self.build_extension(ext)
                finally:
                    ext.optional = True
        except BuildFailed as error:
            self.reason = str(error)
        except LinkError:
            self.reason = f"{self.compiler_name()} could not link the library; pip -v shows why"
        except Exception as error:  # a missing tool, a broken PyTorch, ...
            message = str(error).strip().splitlines() or ["no message"]
            self.reason = f"{type(error).__name__}: {message[0][:200]}"

    def compiler_name(self) -> str:
        return (getattr(self.compiler, "compiler_cxx", None) or ["no C++ compiler"])[0]

    def compiler_version(self) -> str | None:
        try:
            answer = subprocess.run([self.compiler_name(), "--version"], capture_output=True, text=True)
            return answer.stdout.splitlines()[0]
        except (OSError, IndexError):
            return None

    def get_ext_filename(self, fullname: str) -> str:
        return "/".join(fullname.split(".")) + ".so"  # no Python version in the name: it depends on none


class any_python_wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": build_kernels, "bdist_wheel": any_python_wheel},
)
