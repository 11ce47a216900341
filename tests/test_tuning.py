"""`na_compiler.tune` and its records: what is timed, what is written, and who goes by it."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading

import pytest
import torch
from oracle import check_forward, draw

import na_compiler
from na_compiler import KernelSpec, Problem, cli
from na_compiler.compiler import cache, kernels, serving, tuned
from na_compiler.compiler.tuned import Record
from na_compiler.devices import cuda
from na_compiler.schedules import choose as choose_module
from na_compiler.schedules.choose import choose, contenders, family_of, recorded
from na_compiler.schedules.family import Family
from na_compiler.schedules.shared.config_text import parse
from na_compiler.target import Target
from na_compiler.tuning import measure

PROBLEM = Problem((8, 9), 2, 16, 3)
HALF = Problem((64, 64), 8, 64, 13, dtype="float16")
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_TUNED", str(tmp_path / "records" / "tuned.jsonl"))
    return tmp_path / "records" / "tuned.jsonl"


def record(problem=PROBLEM, target="llvm", direction="forward", place=1, device=None, **changes) -> Record:
    """A record of the config at a place among the contenders."""
    machine = Target.parse(target)
    configs = contenders(problem, machine, direction)
    device = device or machine.devices_here[0]
    made = Record(
        device, machine.name, direction, problem, configs[place].family, repr(configs[place]), 1000, repr(configs[0]),
        2000, 1,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def has_gpus(monkeypatch, *gpus):
    monkeypatch.setattr(cuda, "_gpus", lambda: gpus)


@pytest.mark.parametrize("target", ["llvm:x86-64-v4", "llvm:aarch64", "cuda:sm_75", "cuda:sm_80", "cuda:sm_90a"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_contenders_of_every_family_are_read_back_from_text(target, direction):
    machine = Target.parse(target)
    for problem in (HALF, Problem(300, 2, 48, 65, dtype="bfloat16"), Problem((9, 8, 7), 2, 20, 3)):
        found = contenders(problem, machine, direction, 3)
        assert found[0] == choose(problem, machine, direction).config
        assert len(set(found)) == len(found)
        for config in found:
            assert recorded(problem, machine, direction, config.family, repr(config)) == config
        asked = [family for family, reason in choose_module._asked(problem, machine, direction) if reason is None]
        assert {config.family for config in found} == {family.name for family in asked}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "Mma(1)", "Mma", "Sm90(query_tile=(64,))", "1", "", "(" * 500, "Mma(**{})",
        "Mma(warp_box=[4, 4], warps=(1, 1), key_tile=None)", "Mma(warps=(1, 1), warp_box=(4, 4), key_tile=None)",
        "Mma(warp_box=(x for x in ()))",
        "Sweep(warp_box=(4, 4), warps=(1, 1), stream_tile=None, stages=1, chunk=2, blocks=1)",
    ],
)  # fmt: skip
def test_other_texts_are_no_configs(text):
    with pytest.raises(ValueError, match=r"config|family|how this version writes it"):
        recorded(HALF, Target.parse("cuda:sm_80"), "forward", "mma", text)


def test_a_config_that_would_not_be_timed_is_none():
    config = choose(HALF, Target.parse("cuda:sm_80"), "forward").config
    with pytest.raises(ValueError, match="is not how this version writes it"):
        recorded(HALF, Target.parse("cuda:sm_80"), "forward", "mma", repr(config).replace(", ", ","))
    other = repr(dataclasses.replace(config, chunk=5, stages=9))
    assert parse(other, family_of(config).configs) is not None
    with pytest.raises(ValueError, match="none of the 64 configs that mma would try first"):
        recorded(HALF, Target.parse("cuda:sm_80"), "forward", "mma", other)
    with pytest.raises(ValueError, match="no family for cuda:sm_80 is called 'sm90'"):
        recorded(HALF, Target.parse("cuda:sm_80"), "forward", "sm90", other)


def test_what_is_recorded_is_compiled(file, seed):
    before = KernelSpec.make(PROBLEM)
    wanted = record()
    tuned.store(wanted)
    spec = KernelSpec.make(PROBLEM)
    assert repr(before.config) == wanted.planned != wanted.config
    assert repr(spec.config) == wanted.config
    assert (spec.is_tuned, before.is_tuned) == (True, False)
    assert spec.key != before.key
    example = draw(PROBLEM, batch=2)
    output, lse = na_compiler.compile(PROBLEM)(*example.inputs)
    check_forward(example, output, lse)
    assert cache.find(spec.key).config == wanted.config
    other = record(place=2)
    tuned.store(other)
    assert len(file.read_text().splitlines()) == 1, "there is one record of a thing"
    assert KernelSpec.make(PROBLEM).key not in {spec.key, before.key}
    tuned.store(record(direction="backward"))
    assert KernelSpec.make(PROBLEM, direction="forward").tuned == other.choice
    assert KernelSpec.make(PROBLEM.replace(heads=4)).tuned is None


def test_tuning_on_this_cpu(file, capsys):
    """For real: kernels are compiled, compared, timed, and plan, info and calls go by the fastest."""
    problem = ["--layout", "8x9", "--heads", "2", "--head-dim", "16", "--kernel-size", "3"]
    query = torch.randn(1, 8, 9, 2, 16)
    na_compiler.na2d(query, query, query, 3)
    arguments = ["tune", *problem, "--count", "3", "--seconds", "0.1", "--training", "--json"]
    assert cli.main(arguments) == 0
    forward, backward = json.loads(capsys.readouterr().out)["tuned"]
    assert [forward["direction"], backward["direction"]] == ["forward", "backward"]
    assert len(forward["timed"]) == 3
    assert not forward["failed"]
    assert forward["timed"][0]["seconds"] <= forward["timed"][-1]["seconds"] < 1
    spec = KernelSpec.make(PROBLEM)
    assert repr(spec.config) == forward["config"]
    assert kernels.cached_entry(spec) is not None, "the fastest is compiled"
    assert len(file.read_text().splitlines()) == 2
    assert cli.main(["plan", *problem]) == 0
    printed = capsys.readouterr().out
    assert f"tuned on {forward['device']}" in printed
    assert cli.main(["info"]) == 0
    assert f"2 in {file}, of {forward['device']}" in capsys.readouterr().out
    assert cli.main(["tune", *problem, "--count", "1", "--seconds", "0.05"]) == 0
    assert "the planner's choice" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["always", "never"])
def test_calls_of_this_process_go_by_it(file, monkeypatch, when):
    """Also where an open kernel has served the layout before."""
    from na_compiler.ops import kernels as operators

    monkeypatch.setattr(serving, "_served", {})
    monkeypatch.setattr(serving, "is_loaded", lambda spec: False)
    monkeypatch.setattr(serving, "cached_entry", lambda spec: kernels.cached_entry(spec) if spec.tuned else None)
    monkeypatch.setenv("NA_COMPILER_SPECIALIZE", when)
    operators.forget()
    query = torch.randn(1, 8, 9, 2, 16)
    na_compiler.na2d(query, query, query, 3)
    wanted = record()
    monkeypatch.setattr(measure, "seconds_of", lambda specs, *_: (_times(specs, wanted.config), {}))
    na_compiler.tune(PROBLEM)
    looked = []
    found = kernels.compile_spec
    monkeypatch.setattr(serving, "compile_spec", lambda spec: looked.append(found(spec)) or looked[-1])
    kernels.make_entry(KernelSpec.make(PROBLEM))  # As timing it does.
    na_compiler.na2d(query, query, query, 3)
    assert len(looked) == 1
    assert kernels._kernels[KernelSpec.make(PROBLEM)] is looked[0]
    operators.forget()


def _times(specs, fastest, by=2.0):
    return {spec: 1e-3 / by if spec.tuned[1] == fastest else 1e-3 for spec in specs}


@pytest.mark.parametrize("family", ["sm90", "mma", "simt"])
def test_tuning_for_a_gpu_with_a_clock_of_its_own(file, monkeypatch, family):
    """All families that take the problem compete; what the clock says decides, whatever they estimate."""
    target = Target.parse("cuda:sm_90a")
    has_gpus(monkeypatch, (H100, (9, 0)))
    monkeypatch.setattr(measure, "device_of", lambda target: target.devices_here[0])
    fastest = [config for config in contenders(HALF, target, "forward") if config.family == family][-1]
    asked = []

    def seconds_of(specs, batch, seconds, jobs, progress):
        asked.append((len(specs), batch, seconds))
        return _times(specs, repr(fastest)), {specs[0]: "it does not compile"}

    monkeypatch.setattr(measure, "seconds_of", seconds_of)
    tuning = na_compiler.tune(HALF, "cuda:sm_90a", batch=4, seconds=3)
    assert asked == [(17, 4, 3)]
    made = tuning.record
    assert (made.device, made.target, made.family, made.config) == (H100, target.name, family, repr(fastest))
    assert (made.nanoseconds, made.planned_nanoseconds, made.batch) == (500_000, 1_000_000, 4)
    assert tuning.timed[0].config == repr(fastest)
    assert KernelSpec.make(HALF, "cuda:sm_90a").config == fastest
    assert KernelSpec.make(HALF, "cuda:sm_90").config != fastest
    # Little is no reason to leave the planner's choice.
    monkeypatch.setattr(measure, "seconds_of", lambda specs, *_: (_times(specs, repr(fastest), 1.01), {}))
    assert na_compiler.tune(HALF, "cuda:sm_90a").record.config == made.planned


def test_records_are_of_the_device_that_is_here(file, monkeypatch):
    first, second = (record(HALF, "cuda:sm_90a", place=place, device=name) for place, name in ((1, H100), (2, H200)))
    tuned.store(first)
    tuned.store(second)

    def used():
        return KernelSpec.make(HALF, "cuda:sm_90a").tuned

    for name, expected in ((H100, first.choice), (H200, second.choice), ("NVIDIA GH200", None)):
        has_gpus(monkeypatch, (name, (9, 0)))
        assert used() == expected
    # For another machine: the last one that was recorded.
    has_gpus(monkeypatch, ("NVIDIA L4", (8, 9)))
    assert used() == second.choice
    has_gpus(monkeypatch)
    assert used() == second.choice
    monkeypatch.setenv("NA_COMPILER_TUNED", "0")
    assert used() is None


def test_what_cannot_be_read_is_passed_over_with_one_line(file, caplog):
    good = record()
    lines = [record(direction="backward").to_line().replace(na_compiler.__version__, "0.0.7"), "no json"]
    lines += [json.dumps(json.loads(good.to_line()) | {"format": 99}), json.dumps({"format": 1}), good.to_line()]
    file.parent.mkdir()
    file.write_text("\n".join(lines) + "\n")
    with caplog.at_level(logging.WARNING, logger="na_compiler"):
        assert tuned.records() == (good,)
        assert tuned.records() == (good,)
    (said,) = caplog.messages
    assert said.startswith("4 of the 5 records")
    assert "it is of na_compiler 0.0.7" in said
    # They stay, for the version that reads them; only what is about the same is replaced.
    tuned.store(record(place=2))
    assert file.read_text().splitlines()[:2] == lines[:2]
    assert [one.config for one in tuned.records()] == [record(place=2).config]


def test_a_named_file_that_is_not_there_or_no_file_is_said_once(file, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, logger="na_compiler"):
        assert tuned.records() == tuned.records() == ()
        monkeypatch.setenv("NA_COMPILER_TUNED", str(tmp_path))
        assert tuned.records() == tuned.records() == ()
    assert [message.count("not there yet") for message in caplog.messages] == [1, 0]
    assert "is no regular file" in caplog.messages[1]


def test_a_record_that_is_no_config_any_more_is_passed_over_with_one_line(file, caplog):
    tuned.store(record(config="QueriesInLanes(tiling=None, accumulators=3, row_block=None)"))
    spec = KernelSpec.make(PROBLEM)
    with caplog.at_level(logging.WARNING, logger="na_compiler"):
        assert spec.config == choose(PROBLEM, spec.target, "forward").config
        assert not spec.is_tuned
    (said,) = caplog.messages
    assert "passed over" in said


def test_processes_that_write_at_once_lose_nothing(file):
    made = [record(PROBLEM.replace(head_dim=dim)) for dim in range(8, 16)]
    threads = [threading.Thread(target=tuned.store, args=(one,)) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(tuned.records()) == set(made)
    assert [path.name for path in file.parent.iterdir() if not path.name.endswith(".lock")] == [file.name]


def test_errors_name_what_is_wrong(file, capsys, monkeypatch):
    has_gpus(monkeypatch)
    with pytest.raises(ValueError, match=r"target cuda:sm_90a does not run on this machine.*tune there"):
        na_compiler.tune(HALF, "cuda:sm_90a")
    with pytest.raises(ValueError, match="there is none"):
        na_compiler.tune(HALF, "cuda")
    refused = {
        "batch must be from 1": {"batch": 0},
        "count must be from 1 to 64": {"count": 65},
        "seconds must be from": {"seconds": 0},
        "direction must be": {"direction": "up"},
    }
    for said, arguments in refused.items():
        with pytest.raises(ValueError, match=said):
            na_compiler.tune(PROBLEM, **arguments)
    with pytest.raises(ValueError, match=r"problem must have a layout to be timed, got na2d layout=any"):
        na_compiler.tune(PROBLEM.opened())
    monkeypatch.setattr(measure, "seconds_of", lambda specs, *_: ({}, {specs[0]: "no room"}))
    with pytest.raises(RuntimeError, match="none of 8 candidates for na2d"):
        na_compiler.tune(PROBLEM)
    assert not file.exists()
    monkeypatch.setenv("NA_COMPILER_TUNED", "0")
    monkeypatch.setattr(measure, "seconds_of", lambda specs, *_: ({specs[0]: 1.0}, {}))
    with pytest.raises(ValueError, match="NA_COMPILER_TUNED=0 keeps no records"):
        na_compiler.tune(PROBLEM)


def test_a_candidate_that_computes_something_else_is_left_out(file, monkeypatch):
    spec, wrong = (KernelSpec(PROBLEM, "forward", Target.parse("llvm"), tuned=record(place=at).choice) for at in (0, 1))
    prepared = measure._prepared

    def spoiled(kernel, given):
        call, results = prepared(kernel, given)
        is_wrong = kernel is kernels.compile_spec(wrong)
        return (lambda: (call(), results[0].mul_(1.001))) if is_wrong else call, results

    monkeypatch.setattr(measure, "_prepared", spoiled)
    times, failed = measure.seconds_of([spec, wrong], 1, 0.05)
    assert list(times) == [spec]
    assert "differ from the first one's by 1.0e-03" in failed[wrong]


def test_families_that_say_nothing_have_one_contender():
    assert Family.contenders is not choose_module._load("simt").__class__.contenders
    problem, target = Problem(64, 1, 64, 7), Target.parse("cuda:sm_80")
    assert len(choose_module._load("simt").contenders(problem, target, "forward", 64)) > 8
