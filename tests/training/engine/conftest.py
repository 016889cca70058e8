"""Runs in one process, which several files hold engines against."""

import contextlib
from unittest import mock

import pytest
from engine_runs import WHAT, linear_as_zero3


@pytest.fixture(scope="session")
def alone(tiny, pair, inside, tmp_path_factory):
    """alone("full"): the folder of that run of WHAT in one process, made when it is first asked for.

    as_zero3  its linear layers compute as under ZeRO-3 (`linear_as_zero3`)
    """
    folder = tmp_path_factory.mktemp("alone")

    def made(what, *, as_zero3=False):
        name = f"{what}_as_zero3" if as_zero3 else what
        if not (folder / "runs" / name).is_dir():
            function = mock.patch("torch.nn.functional.linear", linear_as_zero3)
            with function if as_zero3 else contextlib.nullcontext():
                inside(folder, "train.py", *tiny.train, f"weights={pair}", *WHAT[what], f"run={name}")
        return folder / "runs" / name

    return made
