"""Runs that others can join: `fit --serve`, `join` and `ranks` of the command line."""

from __future__ import annotations

import argparse
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, RankError
from ..journal.run_directory import JOURNAL
from ..ranks.line import dialled, parse
from ..ranks.member import Gone, Parted
from ..ranks.pool import TOKEN, Pool, read_token
from ..ranks.sealed import ERA, Sealed

VARIABLE = "ZO_OFFLOAD_TOKEN"
_LOOK_S, _WAIT_FOR_ERA_S = 0.05, 5.0


def pool_of(args: argparse.Namespace) -> Pool:
    """The pool that `fit --serve` keeps. Its token is in --token-file, the environment, or the run's own file."""
    run_dir = args.model if args.resume else args.run_dir
    if run_dir is None:
        raise ConfigError("--serve needs --run-dir: members get its journal")
    token = _token(args)
    options = {name: getattr(args, name) for name in ("audit", "tolerance") if getattr(args, name) is not None}
    return Pool(address=args.serve, token=token or _own_token(Path(run_dir)), patience=args.patience, **options)


def invitation(args: argparse.Namespace, port: int) -> str:
    """One line that says how to join."""
    address = f"{args.serve.rpartition(':')[0]}:{port}"
    given = args.token_file is not None or VARIABLE in os.environ
    run_dir = args.model if args.resume else args.run_dir
    token = args.token_file if args.token_file is not None else f"${VARIABLE}" if given else f"{run_dir}/{TOKEN}"
    return f"serving at {address}, with the token in {token}: zo-offload join HOST:PORT BASE --token-file FILE"


def _token(args: argparse.Namespace) -> str | None:
    if args.token_file is not None:
        return read_token(args.token_file)
    return os.environ.get(VARIABLE) or None


def _own_token(run_dir: Path) -> str:
    """The token in a run's directory, created at first use; only the user can read the file."""
    path = run_dir / TOKEN
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return read_token(path)
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_urlsafe(24) + "\n")
    return read_token(path)


def members_token(args: argparse.Namespace) -> str:
    token = _token(args)
    if token is None:
        raise ConfigError(f"--token-file is missing: a file with the keeper's token (or it in {VARIABLE})")
    return token


def join(args: argparse.Namespace, settings: dict[str, Any], *, show: bool) -> Any:
    """Train with a run until it ends; joins again if the two have parted. Returns the last fit's result. With
    --take-over, becomes the keeper where nobody answers any more."""
    from ..engine import Engine

    if args.take_over is not None:
        parse(args.take_over, "--take-over")
        if args.run_dir is None:
            raise ConfigError("--take-over needs --run-dir: a directory of this member's own, which gets the journal")
    while True:
        engine = Engine.join(
            args.address, args.base, token=members_token(args), patience=args.patience, wait=args.wait, **settings
        )
        try:
            with engine:
                return _fit_or_save(engine, args, show)
        except Gone as gone:
            if args.take_over is None or not (Path(args.run_dir) / JOURNAL).exists():
                raise
            print(f"{gone}: this member takes the run over", flush=True)
            return _take_over(args, settings, show)
        except Parted as parted:
            if show:
                print(f"{parted}: joining anew", flush=True)


def _fit_or_save(engine: Any, args: argparse.Namespace, show: bool) -> Any:
    try:
        return engine.fit(args.data, progress=show)
    except Gone:
        if args.take_over is not None:
            engine.save_run(args.run_dir)
        raise


def _take_over(args: argparse.Namespace, settings: dict[str, Any], show: bool) -> Any:
    """Go on with the run that was saved in --run-dir, as its keeper."""
    from ..engine import Engine

    pool = Pool(address=args.take_over, token=members_token(args), patience=args.patience)
    own = {name: value for name, value in settings.items() if name != "run_dir"}
    with Engine.resume(args.run_dir, args.base, ranks=pool, **own) as engine:
        print(f"serving at {args.take_over}", flush=True)
        return engine.fit(args.data, progress=show)


def roster(address: str, token: str) -> Iterator[str]:
    """Lines with a pool's members and their speed. Raises RankError."""
    line = dialled(address)
    try:
        began = time.monotonic()
        while (era := line.get(ERA)) is None or (found := Sealed(line, token, era.decode()).get("roster")) is None:
            if time.monotonic() - began > _WAIT_FOR_ERA_S:
                raise RankError(f"{address} is a store, but no pool's keeper serves it")
            time.sleep(_LOOK_S)
    finally:
        line.close()
    members = found["members"]
    counted = [row for row in members if row.get("rate")]
    yield (
        f"{len(members)} member{'s' * (len(members) > 1)}, {found.get('steps', 0)} steps, "
        f"{sum(row['rate'] for row in counted):.3g} lanes/s; lanes are late after {found.get('patience', 0):.3g} s"
        f"{'; ' + found['closed'] if found.get('closed') else ''}"
    )
    shares = found.get("weights") or {}
    total = sum(shares.values()) or 1.0
    for row in members:
        share = shares.get(row["member"], 0.0) / total
        rate = f"{row['rate']:.3g} lanes/s" if row.get("rate") else "no pass yet"
        at = "" if row.get("step") is None else f"at step {row['step']}, "
        did = f"{at}{row.get('lanes', 0)} lanes, {rate}, share {share:.0%}"
        yield f"  {row['member']:>4}  {row['name']:<28} {did}{' (keeper)' if row['member'] == '0' else ''}"
