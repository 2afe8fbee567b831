"""What the benchmarks compute, print and judge; nothing here measures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import typer
from typer.testing import CliRunner

from bench import bench_push, cli, compare, peer_broadcast, plot, shapes, table, weights
from bench.harness import Spread, size
from bench.loaders import loaders
from bench.ways import COLUMNS, Way, fastest, in_turn, ratio, rows
from engines import gpu_apart, peer_ranks, peers
from weightsync.cli import app as command_line
from weightsync.cli import measuring
from weightsync.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
TINY = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 129,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "torch_dtype": "bfloat16",
    "mlp_only_layers": [1],
}


def way(name, p50, **more):
    spread = {"p50": p50, "p99": 1.1 * p50, "max": 1.1 * p50, "runs": 3, "all": [1.1 * p50, p50, 0.9 * p50]}
    plain = {
        "software": "s",
        "blocked": spread,
        "paused": None,
        "checked": "none",
        "peak": {"rank": 10**9},
        "copied": 0,
    }
    return {"name": name, "seconds": spread, **plain, "load": [0.5], **more}


# --- figures --------------------------------------------------------------------------------------------------------


def test_spread_is_of_ranks_by_nearest_rank():
    hundred = Spread.of(float(i) for i in range(1, 101))
    assert (hundred.p50, hundred.p99, hundred.max, hundred.runs) == (50.5, 99.0, 100.0, 100)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 3.0, 3.0, 3, (3.0, 1.0, 2.0))


@pytest.mark.parametrize(
    ("text", "nbytes"), [("17", 17), ("2B", 2), ("64MiB", 64 << 20), ("1.5GB", 1_500_000_000), ("1GiB", 1 << 30)]
)
def test_sizes(text, nbytes):
    assert size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "1XB", "one"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(typer.BadParameter, match="no size"):
        size(text)


def test_ways_stand_beside_the_first_and_the_fastest_is_named_whoever_it_is():
    ours, peer = way("weightsync", 1.0, copied=4 * 10**9), way("peer", 0.5)
    first, second = rows([ours, peer], 2 * 10**9, 8e9)
    assert len(first) == len(COLUMNS)
    assert dict(zip(COLUMNS, first, strict=True))["of memcpy"] == "0.50"
    assert dict(zip(COLUMNS, second, strict=True))["time / first"] == "0.50"
    assert [dict(zip(COLUMNS, second, strict=True))[key] for key in ("p50", "min", "max")] == [
        "0.500 s",
        "0.450 s",
        "0.550 s",
    ]
    assert dict(zip(COLUMNS, second, strict=True))["GB/s"] == "4.00"
    assert fastest([ours, peer]) == "Fastest: peer."
    assert fastest([ours, way("peer", 1.2)]) == "Fastest: weightsync, level (ranges overlap) with peer."
    assert fastest([ours, way("peer", 1.3)]) == "Fastest: weightsync."


def test_ways_take_turns_and_are_put_together():
    order = []

    def run(name, turn):
        order.append((name, turn))
        spread = Spread.of([float(turn + 1)])
        peak = {"rank": 10 - turn}
        return Way(name, "s", spread, None, spread, "none", peak, phases={"fill": turn}, load=(turn,))

    first, second = in_turn([partial(run, "a"), partial(run, "b")], 3)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert (first.name, second.name) == ("a", "b")
    assert first.seconds == second.paused == Spread.of([1.0, 2.0, 3.0])
    assert (first.blocked, first.peak, first.phases, first.load) == (None, {"rank": 10}, {"fill": 1}, (0, 1, 2))


# --- the broadcast that a push is compared with ---------------------------------------------------------------------


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """A trainer and an engine of TP 2 of the peer, after a transfer, in one process."""
    model = shapes.Model("tiny", "", {}, TINY)
    model.write(tmp_path)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    trainer = peer_broadcast.Trainer(model, None, None)
    engines = [peer_broadcast.Engine(model, str(tmp_path), 2, rank, None) for rank in range(2)]
    for engine in engines:
        sent = iter(trainer.weights.values())
        monkeypatch.setattr(dist, "broadcast", lambda into, *_, sent=sent, **__: into.copy_(next(sent)))
        engine.transfer()
    return trainer, engines


def test_the_peer_loads_what_was_sent(loaded):
    trainer, engines = loaded
    peer_broadcast.compare([trainer.sums(), *(engine.sums() for engine in engines)], 1, 2)


def test_the_peer_notices_one_wrong_byte(loaded):
    trainer, engines = loaded
    experts = engines[1].params["model.layers.0.mlp.experts.w13.weight"]
    experts.view(torch.uint8)[3, 5, 7] ^= 1
    with pytest.raises(RuntimeError, match=r"1 tensors arrived wrong, model.layers.0.mlp.experts.3"):
        peer_broadcast.compare([trainer.sums(), *(engine.sums() for engine in engines)], 1, 2)


def test_the_peer_notices_ranks_that_differ(loaded):
    trainer, engines = loaded
    engines[1].params["model.norm.weight"].view(torch.uint8)[0] ^= 1
    with pytest.raises(RuntimeError, match="two ranks of one engine differ"):
        peer_broadcast.compare([trainer.sums(), *(engine.sums() for engine in engines)], 1, 2)


def test_whole_tensors_are_views_of_parameters(loaded):
    """What torchstore gets straight into."""
    trainer, (engine, _) = loaded
    places = engine.whole_places()
    assert {"model.norm.weight", "model.layers.0.input_layernorm.weight"} <= places.keys()
    assert "model.layers.0.self_attn.q_proj.weight" not in places, "half of it is the other rank's"
    for param in engine.params.values():
        param.zero_()
    for name, tensor in trainer.weights.items():
        if name in places:
            places[name].copy_(tensor)
        else:
            engine.load(name, tensor)
    test_the_peer_loads_what_was_sent(loaded)


def test_torchstore_is_left_out_where_it_cannot_run(monkeypatch, capsys):
    def case(ranks):
        return bench_push.Case(shapes.Model("tiny", "", {}, TINY), ranks, 1, 1, 1, "1MiB", 1)

    push, peer = bench_push.Name.push, bench_push.Name.torchstore
    monkeypatch.setattr(bench_push, "_TORCHSTORE", ("no_such_store", "json"))
    assert bench_push.possible(case(1), [push, peer]) == [push]
    assert "torchstore is left out: no_such_store not installed" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="torchstore cannot be measured: no_such_store"):
        bench_push.possible(case(1), [peer])
    monkeypatch.setattr(bench_push, "_TORCHSTORE", ("json",))
    assert bench_push.possible(case(1), [push, peer]) == [push, peer]
    assert bench_push.possible(case(2), [push, peer]) == [push]
    assert "one trainer rank only" in capsys.readouterr().err


def test_weights_change_between_pushes():
    model = shapes.Model("tiny", "", {}, TINY)
    ours = weights.whole(model)
    before = {name: tensor.clone() for name, tensor in ours.items()}
    weights.change(ours)
    changed = [name for name in ours if not torch.equal(ours[name].view(torch.int16), before[name].view(torch.int16))]
    assert len(changed) == min(49, len(ours) - 1)


# --- comparing with a baseline --------------------------------------------------------------------------------------


def measured(**least):
    stats = [{"fullname": f"bench/pure/test_x.py::{name}", "stats": {"min": value}} for name, value in least.items()]
    return {"machine_info": {"node": "n", "cpu": {"count": 2}}, "benchmarks": stats}


def test_compare_gives_ratios_and_what_is_new_or_gone():
    found = compare.compare(measured(same=1.0, gone=1.0), measured(same=3.0, new=1.0))
    assert [(row.name, row.ratio) for row in found] == [("same", 3.0), ("new", None), ("gone", None)]


@pytest.mark.parametrize(("more", "status"), [([], 0), (["--fail-above", "3.1"], 0), (["--fail-above", "2.9"], 1)])
def test_compare_judges_only_when_asked(tmp_path, more, status):
    before, now = tmp_path / "before.json", tmp_path / "now.json"
    before.write_text(json.dumps(measured(plan=1.0)))
    now.write_text(json.dumps(measured(plan=3.0)))
    result = CliRunner().invoke(compare.app, [str(now), str(before), *more])
    assert result.exit_code == status, result.output
    assert "3.00" in result.stdout


def test_compare_refuses_other_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no file of pytest-benchmark"):
        compare.read(path)


def test_the_baseline_names_every_pure_benchmark():
    written = {one["name"] for one in compare.read(compare.BASELINE)["benchmarks"]}
    tests = (ROOT / "bench/pure").glob("test_*.py")
    assert written == {
        name for path in tests for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }


# --- the page, the pictures, the command ----------------------------------------------------------------------------


def test_the_page_is_what_the_json_gives():
    page = table.PAGE.read_text()
    assert page.count("<!-- bench: ") == page.count("<!-- end -->") > 5
    assert table.render(page, table.PAGE.with_suffix("")) == page, "run: python -m bench table"


def test_a_changed_figure_changes_the_page(tmp_path):
    document = {"figures": {"engines": 2, "bytes": 64, "seconds": way("", 0.004)["seconds"]}, "load": {"before": [1.0]}}
    (tmp_path / "small.json").write_text(json.dumps(document))
    page = table.render("text\n<!-- bench: small small.json -->\nold\n<!-- end -->\nmore\n", tmp_path)
    assert "4.0 / 4.4 / 4.4 ms" in page
    assert "old" not in page
    assert page.startswith("text\n")
    assert page.endswith("<!-- end -->\nmore\n")


def loading(engine, way, each, **more):
    """A row of `engines.gpu_speed`."""
    facts = {"tp": 2, "bytes": 2**31, "tensors": 9, "checked": [0] * len(each), "until_filled": 0.5, "phases": {}}
    return {"engine": engine, "way": way, "seconds_each": each, "good": True} | facts | more


def test_pushes_into_engines_are_measured_by_our_plugin_in_the_same_engine():
    ours = loading("a", "plugin", [9, 8, 7, 6, 0.5, 0.4, 0.6], checked=[0, 9, 9, 9, 9, 9, 9], phases={"fill": 0.2})
    peer = {"peer": True, "software": "S 1", "settings": "as told", "before": {"register": 3.0}, "warm": 1}
    document = {
        "gpu": "G",
        "torch": "2",
        "command": ["x.py", "--tp", "2"],
        "ways": [
            loading("a", "tensor", [7.0, 4.0, 5.0], phases={"load": 4.4, "plan": 0.001}),
            ours,
            loading("b", "ipc", [3.0]),
            loading("a", "slime", [9.0, 2.0], **peer),
            {"engine": "b", "way": "vllm-ipc", "peer": True, "good": False, "log": ["it fell"]},
        ],
    }
    lines = loaders(document, table.table)
    assert (
        "| a | weightsync, stock server (`tensor`) | 4.50 (4.00–5.00) s | 2 | 9.0 | 0.50 s | none | load 4,400 ms |"
        in (lines[4])
    )
    assert (
        "| **0.50 (0.40–0.60) s** | 3 | 1.0 | 0.50 s | 9 of 9 tensors | fill 200 ms | 9.0 / 8.0 / 7.0 / 6.0 s |"
        in (lines[5])
    )
    assert "| a | slime | 2.00 (2.00–2.00) s | 1 | 4.0 |" in lines[6]
    assert "| b | weightsync, stock server (`ipc`) | **3.00 (3.00–3.00) s** | 1 | – |" in lines[7]
    assert "- slime into a: S 1, as told; before the pushes: register 3.0 s" in lines
    assert "- vllm-ipc into b: failed in this run" in lines
    assert lines[-1] == "`x.py --tp 2`"


def test_a_peer_is_one_row_of_all_its_ranks():
    def rank(register):
        pushes = [
            {"bytes": 8, "tensors": 2, "phases": {"load": took}, "complete": True, "wall_seconds": took}
            | {"until_filled_seconds": register}
            for took in (9.0, 2.0, 4.0)
        ]
        return {"pushes": pushes, "before": {"register": register}, "software": "S 1", "settings": "as told"}

    row = peers.row(peers.PEERS["checkpoint-engine"], [rank(3.0), rank(5.0)], engine="a 1", tp=2)
    assert (row["seconds"], row["phases"], row["warm"]) == (3.0, {"load": 3.0}, 1)
    assert row["before"] == {"register": 5.0}
    assert row["checked"] == [0, 0, 0]
    document = {"gpu": "G", "torch": "2", "command": "x", "ways": [row]}
    line = "| a 1 | checkpoint-engine | **3.00 (2.00–4.00) s** | 2 | – | 3.00 s | none | load 3,000 ms | 9.0 s |"
    assert line in loaders(document, table.table)


def test_pushes_to_gpus_of_their_own_are_measured_by_a_broadcast_of_the_same_run():
    broadcasts = {"NCCL broadcast, buckets": 2**31 / 1e9, "NCCL broadcast, tensor by tensor": 1.0}
    ways = [loading("a", "plugin", [9, 8, 7, 6, 0.5], checked=[9]), loading("a", "group", [9.0, 2.0])]
    ways += [gpu_apart.failed("vllm", "vllm-nccl", "it refused")]
    document = {"gpu": "G", "torch": "2", "command": "x", "ways": ways, "broadcasts": broadcasts}
    lines = loaders(document, table.table)
    assert lines[2].endswith("| bytes a second | of an NCCL broadcast |")
    assert lines[4].endswith("| 4 GB/s | 2.00 |")
    assert lines[5].endswith("| 1 GB/s | 0.50 |")
    assert "- vllm-nccl into vllm: failed in this run" in lines
    assert any("NCCL broadcast, buckets 2 GB/s, NCCL broadcast, tensor by tensor 1 GB/s" in line for line in lines)


def test_a_slot_for_a_stock_server_holds_the_largest_tensor():
    assert gpu_apart.whole("1GiB", [(2, 3), (151936, 4096)], 2) == "1187MiB"
    assert gpu_apart.whole("2GiB", [(2, 3), (151936, 4096)], 2) == "2GiB"
    assert gpu_apart.whole("64KiB", [(257, 257)], 1) == "1MiB"


def test_how_long_a_peer_holds_a_trainer_up():
    assert peer_ranks.until_filled(None, [], 4.0) == 4.0
    assert peer_ranks.until_filled({"register": 3.0}, [], 4.0) == 3.0
    assert peer_ranks.until_filled({"join": 9.0}, [1.0, 2.0], 4.0) == 3.0


def test_a_peer_finds_the_checkout_in_either_kind_of_environment():
    found = peers.environment({"PYTHONPATH": "/p"})
    assert found == {"EXTRA_PYTHONPATH": str(ROOT), "PYTHONPATH": f"{ROOT}:/p"}
    assert peers.environment({})["PYTHONPATH"] == str(ROOT)


def test_a_part_that_nobody_writes_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing writes parts of kind 'x'"):
        table.render("<!-- bench: x y.json -->\n<!-- end -->", tmp_path)


@pytest.mark.parametrize("name", ["transports.json", "push-ways.json"])
def test_pictures(tmp_path, name):
    document = json.loads((ROOT / "docs/benchmarks/cpu" / name).read_text())
    plot.draw(document, tmp_path / "x.svg")
    assert document["title"].split()[0] in (tmp_path / "x.svg").read_text()
    with pytest.raises(ConfigError, match="no picture"):
        plot.draw({"title": "t", "figures": []}, tmp_path / "y.svg")
    with pytest.raises(ConfigError, match="no picture"):
        plot.draw({"benchmarks": []}, tmp_path / "y.svg")
    with pytest.raises(ConfigError, match="lacks figures"):
        plot.draw({"title": "t", "figures": {"ways": [{"name": "n"}]}}, tmp_path / "y.svg")


def test_what_has_no_picture_is_left_out_and_the_others_are_drawn(tmp_path, capsys):
    cpu = ROOT / "docs/benchmarks/cpu"
    plot.main([cpu / "pure.json", cpu / "sglang.json"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sglang.svg"]
    assert "pure.json left out: " in capsys.readouterr().err


def test_pictures_do_not_overwrite_each_other(tmp_path):
    cpu = ROOT / "docs/benchmarks/cpu"
    with pytest.raises(ConfigError, match="several files would be drawn as"):
        plot.main([cpu / "push-ways.json", cpu / "sglang.json"], tmp_path / "x.svg")
    with pytest.raises(ConfigError, match="several files would be drawn as"):
        plot.main([cpu / "sglang.json", tmp_path / "sglang.json"], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_what_no_suite_has_written_is_refused(text, tmp_path):
    (file := tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        plot.main([file], tmp_path)


@pytest.mark.parametrize(
    ("value", "shown"), [(1.0, "1.0"), (0.404, "0.40"), (9.67, "9.7"), (9.96, "10"), (147.0, "147"), (0.0521, "0.052")]
)
def test_ratios_have_two_digits(value, shown):
    assert ratio(value) == shown


def test_help_names_every_suite():
    help_text = CliRunner().invoke(cli.app, ["--help"]).stdout
    assert all(f"\n  {name} " in help_text for name in (*cli.SUITES, *cli.TOOLS, "all"))


def test_a_suite_runs_from_the_command_line_and_tells_its_circumstances(tmp_path):
    shape, out = tmp_path / "tiny.json", tmp_path / "plan.json"
    shape.write_text(json.dumps(TINY))
    arguments = ["plan", "--shape", str(shape), "--ranks", "2", "--json", str(out)]
    command = [sys.executable, "-m", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["command"] == f"python -m bench {' '.join(arguments)}"
    assert document["figures"][0]["tensors"] == len(shapes.load(str(shape)).tensors)
    assert {"hardware", "versions", "load"} <= document.keys()
    assert "FSDP over 2" in table.plan(document)[2]


def test_all_refuses_a_suite_that_is_not_there():
    result = CliRunner().invoke(cli.app, ["all", "--only", "nope"])
    assert result.exit_code == 2
    assert "nope" in result.output


def test_the_installed_command_says_where_the_benchmarks_are(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "__file__", str(tmp_path / "weightsync/cli/measuring.py"))
    result = CliRunner().invoke(command_line, ["bench", "push"])
    assert isinstance(result.exception, ConfigError)
    assert "not in the installed package" in str(result.exception)


def test_the_command_of_a_source_tree_is_the_same_one(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = CliRunner().invoke(command_line, ["bench", "--help"])
    assert result.exit_code == 0
    assert "transports" in result.stdout
