"""Folders of the cache: what is prepared once, under a key of all that decides its content."""

import ast
import inspect
import json
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from hashlib import file_digest, sha256
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from filelock import FileLock

from lit_distill.data.store import Array, Stored
from lit_distill.errors import UserError
from lit_distill.files import atomic_folder, cache_folder
from lit_distill.remote import AnyPath, version_of

FORMAT = 4  # version of the files
META = "meta.json"
TICK = 1.0  # seconds in which two versions of a file may have the same time

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Prepared:
    """A folder of the cache."""

    folder: Path
    key: str  # of its content
    meta: dict[str, Any]

    def array(self, name: str) -> Array:
        """A mapped array."""
        found: Array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        # indexing the subclass is slow
        return found.view(np.ndarray)


def key_of(*parts: Any) -> str | None:
    """A name for all that decides a content; ``None`` if a part is ``None``, which is unknown."""
    return None if None in parts else sha256(json.dumps([FORMAT, package_hash(), *parts]).encode()).hexdigest()[:32]


@cache
def package_hash() -> str:
    """A hash of this package's code, which decides how rows are read."""
    found = sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def code_of(code: Any) -> list[str] | None:
    """Hashes of the files that a function, or a class and its bases, are defined in, and of those that these import.

    Without this package's, and installed ones that are imported. ``None`` if there is no file, as in a notebook, or if
    a function has variables of one that it is within.
    """
    if not inspect.isclass(code) and not inspect.isfunction(code):
        return None
    found = []
    for one in code.__mro__ if inspect.isclass(code) else (code,):
        top = one.__module__.partition(".")[0]
        if top in ("builtins", "lightning", "typing", "abc", "torch", _PACKAGE.name):
            continue
        try:
            path = inspect.getsourcefile(one)
        except TypeError:
            path = None
        functions = filter(inspect.isfunction, vars(one).values() if inspect.isclass(one) else [one])
        # `super()` makes a variable of the class
        if (
            path is None
            or not Path(path).is_file()
            or any({*f.__code__.co_freevars} - {"__class__"} for f in functions)
        ):
            return None
        files = {one.__module__: path} | _imported(one.__module__)
        found.append(" ".join([one.__qualname__, *(_code_content(*file) for file in files.items())]))
    return found


_code_hashes: dict[str, tuple[Any, str]] = {}  # path -> how its module was loaded, and a hash


def _code_content(name: str, path: str) -> str:
    """A hash of a module's file; of one that is loaded as it was at first, as that is what runs."""
    if (module := sys.modules.get(name)) is None:
        return _content(Path(path))
    # made anew by a reload
    spec = module.__spec__
    if path not in _code_hashes or _code_hashes[path][0] is not spec:
        _code_hashes[path] = spec, _content(Path(path))
    return _code_hashes[path][1]


@cache
def _imported(name: str) -> dict[str, str]:
    """The files of a module and of those that it imports, and they in turn, without installed ones."""
    installed, found, todo = Path(sysconfig.get_path("stdlib")), dict[str, str](), [name]
    while todo:
        name = todo.pop()
        path, package = _file_of(name)
        known = path.is_relative_to(_PACKAGE) or path.is_relative_to(installed)
        known |= not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        if name in found or known or path.suffix != ".py" or not path.is_file():
            continue
        found[name] = str(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                todo += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return dict(sorted(found.items()))


def _file_of(name: str) -> tuple[Path, str]:
    """The file, if any, and the package of a module, which a function may import only when it is called."""
    if (module := sys.modules.get(name)) is not None:
        return Path(getattr(module, "__file__", None) or ""), module.__package__ or ""
    parent = name.rpartition(".")[0]
    try:
        # of a package that is not loaded either, it would be
        spec = find_spec(name) if not parent or parent in sys.modules else None
    except (ImportError, ValueError):
        spec = None
    return (Path(), "") if spec is None else (Path(spec.origin or ""), spec.parent or "")


def prepare(name: str, key: str | None, write: Callable[[Path], dict[str, Any]]) -> Prepared:
    """The folder of a key in the cache, filled by ``write``, which returns its ``meta``, unless it is there.

    Processes that want the same one wait for the first. Without a key it is filled in any case, and named by its
    content. Raises a ``UserError`` if it cannot be kept.
    """
    root = cache_folder()
    folder = root / f"{name}-{key or 'new'}"
    if (found := cached(name, key)) is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        # a second process waits and reads the folder of the first
        with FileLock(f"{folder}.lock"):
            if (found := cached(name, key)) is None:
                with atomic_folder(folder) as tmp_path:
                    meta = write(tmp_path)
                    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
                    (tmp_path / META).write_text(json.dumps({"sizes": sizes, **meta}))
                if key is None:
                    folder, key = _by_content(folder, name)
                found = cached(name, key)
    except OSError as error:
        raise UserError(f"prepared rows cannot be kept in {str(root)!r} ({error}); set LIT_DISTILL_CACHE") from error
    if found is None:
        raise UserError(f"prepared rows were lost: {folder} is damaged as soon as it is written")
    return found


def _by_content(folder: Path, name: str) -> tuple[Path, str]:
    """Rename a folder by its content."""
    digest = sha256()
    for path in sorted(folder.iterdir()):
        digest.update(_content(path).encode())
    key = digest.hexdigest()[:32]
    target = folder.with_name(f"{name}-{key}")
    if cached(name, key) is None:
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    else:
        shutil.rmtree(folder)
    return target, key


def cached(name: str, key: str | None) -> Prepared | None:
    """A folder of the cache; ``None`` if it is absent, damaged, or of files that changed just after it was made."""
    folder = cache_folder() / f"{name}-{key}"
    try:
        meta = json.loads((folder / META).read_bytes())
        if any(_content(Path(path)) != digest for path, digest in meta.get("young", {}).items()):
            return None
        for name, size in meta["sizes"].items():
            if (folder / name).stat().st_size != size:
                return None
            if name.endswith(".arrow"):
                Stored(folder / name)
            elif name.endswith(".npy"):
                np.load(folder / name, mmap_mode="r")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, pa.ArrowException):
        return None
    return None if key is None else Prepared(folder, key, meta)


def versions(paths: Iterable[AnyPath]) -> list[list[str]] | None:
    """Names, sizes and times of files; ``None`` if one is absent, or its file system tells none."""
    found = []
    for path in paths:
        try:
            version = version_of(path)
        except OSError:
            return None
        if version is None:
            return None
        found.append([str(path.absolute()), *version])
    return found


def young(paths: Iterable[AnyPath]) -> dict[str, str]:
    """Content of the files that are so new that they may change and keep their time."""
    local = (path.absolute() for path in paths if isinstance(path, Path))
    return {str(path): _content(path) for path in local if time.time() - path.stat().st_mtime < TICK}


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
