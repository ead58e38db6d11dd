"""The command line that all experiments share, their work directories and their exit codes.

    python -m experiments.NAME [PRESET] [--field value ...] [--workdir DIR] [--resume] [--seeds N]

A preset is a function that returns the experiment's config, a frozen dataclass whose fields are the
flags. Exit codes: 0 the run finished, 2 the user can mend it (one line says how), 3 a number was
not finite, 42 stopped by a signal and ready to be resumed, 130 interrupted, 134 another process of
the run was lost, 1 a bug.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import shlex
import sys
import types
import typing
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import jax
import tyro
from etils import epath

from jaxalign.core import distributed, places, profile
from jaxalign.core.checkpoint import cache_directory
from jaxalign.core.loop import Preempted
from jaxalign.core.metrics import disk_full, environment, plain, write_json
from jaxalign.core.types import NonFinite, UserError

Presets = Mapping[str, Callable[[], Any]]

FINISHED, USER_ERROR, NON_FINITE, PREEMPTED, INTERRUPTED = 0, 2, 3, 42, 130


@dataclasses.dataclass(frozen=True)
class Run:
    """What the command line asks for.

    seeds: the seeds to run, the config's own first.
    workdir: of this run, a local folder once it runs; with several seeds the directory that holds
        one for each.
    command: the command line itself, without --resume.
    profile: steps to record once all is compiled, into `profile/` of the workdir; 0 for none.
    """

    name: str
    preset: str
    config: Any
    workdir: Path
    resume: bool
    seeds: list[int]
    command: str
    profile: int = 0


# --- parsing -------------------------------------------------------------------------------------


def parse(name: str, presets: Presets, default: str, argv: Sequence[str] | None = None) -> Run:
    """The run that `argv` (default: the process's) asks for; `--help` prints and exits.

    name: the experiment's module, as in `python -m experiments.NAME`.
    default: the preset where none is named.
    Raises: UserError for anything wrong, in one line with the nearest right name.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    preset, flags = _split(argv, default)
    if preset not in presets:
        raise UserError(f"no preset {preset!r}{_nearest(preset, presets) or _all(presets)}")
    defaults = presets[preset]()
    options = _options_class(type(defaults))
    start = options(config=defaults)
    if any(flag.name in ("--help", "-h") for flag in flags):
        _help(name, presets, preset, options, start)
    chosen = _choose(flags, options, start)
    seed = getattr(chosen.config, "seed", 0)
    usual = Path("runs") / f"{name}-{preset}-{seed}"
    if chosen.seeds < 1:
        raise UserError(f"--seeds {chosen.seeds}: must be at least 1")
    if chosen.profile < 0:
        raise UserError(f"--profile {chosen.profile}: must not be negative; 0 records nothing")
    return Run(
        name=name,
        preset=preset,
        config=chosen.config,
        workdir=_path(chosen.workdir) if chosen.workdir else usual,
        resume=chosen.resume,
        seeds=list(range(seed, seed + chosen.seeds)),
        profile=chosen.profile,
        command=_command(name, [word for word in argv if word != "--resume"]),
    )


def _path(text: str) -> Path:
    return epath.Path(text)  # ty: ignore[invalid-explicit-return] (it is one; of a bucket it keeps //)


_RUN_FLAGS = {"--workdir": str | None, "--resume": bool, "--seeds": int, "--profile": int}


class _Flag(typing.NamedTuple):
    name: str  # as written
    words: list[str]  # the flag and its values, as written


def _split(argv: Sequence[str], default: str) -> tuple[str, list[_Flag]]:
    """The preset, and the flags each with its values."""
    preset, flags = None, []
    for word in argv:
        if word.startswith("--") or word == "-h":
            flags.append(_Flag(word.split("=")[0], [word]))
        elif flags and flags[-1].name != "--resume":
            flags[-1].words.append(word)
        elif preset is None:
            preset = word
        else:
            raise UserError(f"{word!r} stands alone: after the preset come --field value pairs")
    return preset or default, flags


def _options_class(config: Any) -> Any:
    """The config's fields and the run's own, as one flat dataclass."""
    return dataclasses.make_dataclass(
        "Options",
        [
            ("config", Annotated[config, tyro.conf.arg(name="")]),
            (
                "workdir",
                _described(
                    str | None,
                    "where all is written (runs/NAME-PRESET-SEED); may be gs://BUCKET/RUN",
                ),
                None,
            ),
            ("resume", _described(bool, "go on with the run in the workdir", pair=False), False),
            ("seeds", _described(int, "how many seeds, from the config's seed upwards"), 1),
            ("profile", _described(int, "steps to record, for `python -m tpu.profile`"), 0),
        ],
        frozen=True,
    )


def _described(kind: Any, text: str, pair: bool = True) -> Any:
    described = Annotated[kind, tyro.conf.arg(help=text)]
    return described if pair else Annotated[described, tyro.conf.FlagCreatePairsOff]


def _choose(flags: Sequence[_Flag], options: type, start: Any) -> Any:
    """The options with all flags applied. Raises UserError for the first flag that is wrong."""
    known = {**_flag_types(type(start.config)), **_RUN_FLAGS}
    seen = set()
    for flag in flags:
        name = _dashed(flag.name)
        if name not in known:
            raise UserError(
                f"no option {flag.name}{_nearest(name, known) or '; --help lists them all'}"
            )
        if name in seen:
            raise UserError(f"{flag.name} is given twice; leave one out")
        seen.add(name)
    chosen = _parsed(flags, options, start)
    if chosen is not None:
        return chosen
    # Each flag alone, to find the one to blame, whatever the parser's own words about it.
    wrong = next((flag for flag in flags if _is_refused(flag, options, start)), flags[-1])
    raise UserError(_complaint(wrong, known[_dashed(wrong.name)]))


def _parsed(flags: Sequence[_Flag], options: Any, start: Any) -> Any:
    """The options, or None where tyro refuses a flag (its many lines about it are dropped)."""
    silent = io.StringIO()
    with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
        try:
            return tyro.cli(options, default=start, args=[w for flag in flags for w in flag.words])
        except SystemExit:
            return None


def _is_refused(flag: _Flag, options: type, start: Any) -> bool:
    try:
        return _parsed([flag], options, start) is None
    except UserError:
        return False  # the config may only fit with all flags together


def _complaint(flag: _Flag, kind: Any) -> str:
    words = " ".join(flag.words).replace("=", " ", 1).split()[1:]
    given = " ".join([flag.name, *words])
    if kind is bool:
        return f"{given}: is a switch; write {flag.name} alone, without a value"
    if not words and typing.get_origin(kind) is not tuple:
        return f"{given}: a value is missing; it must be {_type_name(kind)}"
    return f"{given}: the value must be {_type_name(kind)}"


def _flag_types(kind: Any, prefix: str = "--") -> dict[str, Any]:
    """The type of each field by its flag, in dashes; nested configs as `--outer.inner`."""
    known: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint, flag = hints[field.name], prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            known |= _flag_types(hint, f"{flag}.")
            continue
        known[flag] = hint
        if hint is bool:
            known[f"{prefix}no-{flag.removeprefix(prefix)}"] = bool
    return known


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


def _type_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("None" if item is type(None) else _type_name(item) for item in inner)
    if origin in (tuple, list):
        return "a list of " + _type_name(inner[0])
    return getattr(kind, "__name__", str(kind))


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def _all(known: Iterable[str]) -> str:
    return "; choose one of " + ", ".join(known)


def _help(name: str, presets: Presets, preset: str, options: type, start: Any) -> NoReturn:
    width = max(map(len, presets))
    lines = [f"  {word:{width}}  {_first_line(make)}" for word, make in presets.items()]
    text = "\n".join(["Presets:", *lines, "", f"The defaults below are those of {preset}."])
    prog = f"python -m experiments.{name} [PRESET]"
    tyro.cli(options, default=start, prog=prog, description=text, args=["--help"])
    raise SystemExit(FINISHED)


def _first_line(function: Callable[[], Any]) -> str:
    return (function.__doc__ or "").strip().split("\n")[0]


def _command(name: str, words: Sequence[str]) -> str:
    return shlex.join(["python", "-m", f"experiments.{name}", *words])


# --- work directories ----------------------------------------------------------------------------


def open_workdir(run: Run) -> Path:
    """The run's directory, made, with `config.json` and `env.json` in it.

    Raises: UserError when it is in use and the run does not resume, when the run resumes with
        another config, and on a full disk.
    """
    path, config = run.workdir, plain(dataclasses.asdict(run.config))
    try:
        path.mkdir(parents=True, exist_ok=True)
        used = any(file.suffix != ".tmp" for file in path.iterdir())  # a kill may leave those
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"--workdir {path}: not a directory to write in ({error.strerror}); choose another"
        ) from error
    if used and not run.resume:
        raise UserError(
            f"{path} exists and is not empty: go on with --resume, or choose another --workdir"
        )
    if used:
        _check_config(path, config)
    else:
        write_json(path / "config.json", config)
    if not (path / "env.json").exists():
        record = {"experiment": run.name, "preset": run.preset, "command": run.command}
        write_json(path / "env.json", {**record, **environment()})
    return path


def open_seeds(run: Run) -> list[Run]:
    """One run for each seed, its directory open: the workdir itself, or `seed-N` inside.

    All are opened before the first starts, so that a directory in use is told at once.
    """
    if len(run.seeds) == 1:
        open_workdir(run)
        return [run]
    runs = [
        dataclasses.replace(
            run,
            config=dataclasses.replace(run.config, seed=seed),
            workdir=run.workdir / f"seed-{seed}",
            seeds=[seed],
        )
        for seed in run.seeds
    ]
    for each in runs:
        open_workdir(each)
    return runs


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError naming the first field in which the directory's config is another."""
    try:
        there = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no run's directory (no readable config.json in it), so nothing can be "
            "resumed there; choose another --workdir"
        ) from error
    here, there = _flat(config), _flat(there)
    for name in dict.fromkeys([*here, *there]):
        if here.get(name, "absent") != there.get(name, "absent"):
            raise UserError(
                f"{path} was made with another config: {name} is {there.get(name, 'absent')!r} "
                f"there and {here.get(name, 'absent')!r} here; resume with the same flags, or "
                "choose another --workdir"
            )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


# --- exit codes ----------------------------------------------------------------------------------


def main(
    run: Callable[[Run], Any],
    name: str,
    presets: Presets,
    default: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses the command line and calls `run`; ends the process unless that went well."""
    argv = list(sys.argv[1:] if argv is None else argv)
    resume = _command(name, [*(word for word in argv if word != "--resume"), "--resume"])
    with distributed.left_together(), exit_codes(resume):
        asked = parse(name, presets, default, argv)
        use_all_cores()
        keep_compiled_programs()
        distributed.start()
        asked = dataclasses.replace(asked, workdir=places.open_folder(asked.workdir))
        steps = asked.profile if distributed.is_main() else 0
        with _quiet_unless_main(), profile.asking(asked.workdir / profile.FOLDER, steps):
            run(asked)


@contextlib.contextmanager
def _quiet_unless_main() -> Generator[None, None, None]:
    """Processes but the first print nothing; at the end its files are put in their place."""
    with contextlib.ExitStack() as stack:
        if not distributed.is_main():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield
        finally:
            places.keep()


def use_all_cores() -> None:
    """On a CPU as many devices as cores, up to 8: XLA runs small programs on one core a device.

    A power of two, which batches divide by. Must come before the first use of a device.
    """
    if jax.config.values["jax_num_cpu_devices"] == -1:  # else somebody has chosen
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        jax.config.update("jax_num_cpu_devices", min(1 << (cores or 1).bit_length() - 1, 8))


def keep_compiled_programs() -> None:
    """Compiled programs are kept in the cache, so that a second run starts at once."""
    if not jax.config.values.get("jax_compilation_cache_dir"):
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "compiled"))


@contextlib.contextmanager
def exit_codes(resume: str = "") -> Generator[None, None, None]:
    """Turns what a user can cause into one line on stderr and an exit code.

    resume: the command that goes on with a run that was stopped.
    """
    try:
        yield
    except NonFinite as error:
        _exit(NON_FINITE, f"error: {error}")
    except UserError as error:
        _exit(USER_ERROR, f"error: {error}")
    except Preempted as error:
        how = f"; resume with: {resume}" if error.saved and resume else ""
        _exit(PREEMPTED, f"stopped at step {error.step}{how}" if error.saved else str(error))
    except KeyboardInterrupt:
        _exit(INTERRUPTED, "interrupted")
    except jax.errors.JaxRuntimeError as error:
        if not distributed.is_lost(error):
            raise
        how = f"; resume with: {resume}" if resume else ""
        _exit(distributed.LOST, f"another process of the run was lost{how}")
    except OSError as error:
        if not disk_full(error):
            raise
        _exit(USER_ERROR, f"error: {error.filename or 'a file'}: the disk is full; free some space")


def _exit(code: int, line: str) -> NoReturn:
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(code)
