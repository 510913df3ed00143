"""The command line: what it accepts, prints, writes and answers with."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import children
import needs
import numpy as np
import pytest
from commands import Result, Run, assert_one_line_error, start

from anepy.models.model import Model
from anepy.native import find

COMMANDS = [
    "train", "compare", "generate", "eval", "fuse", "init", "convert", "fetch", "prepare", "mil",
    "runs", "plot", "bench", "probe", "info",
]  # fmt: skip
LIB_COMMANDS = ["path", "build", "fetch", "verify"]


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1]) >= step:
            return
    raise AssertionError(process.communicate())


# Help and usage


@pytest.mark.parametrize("words", [[c] for c in COMMANDS] + [["lib", c] for c in LIB_COMMANDS])
def test_help_ends_with_two_examples_that_parse(run: Run, words: list[str]) -> None:
    result = run(*words, "--help")
    assert result.code == 0
    _, _, examples = result.out.partition("Examples:\n")
    lines = examples.strip().splitlines()
    assert len(lines) == 2, result.out
    assert any(line.strip().startswith("anepy " + " ".join(words)) for line in lines)


def test_help_needs_neither_numpy_nor_rich_nor_the_library() -> None:
    code = (
        "import sys; sys.argv = ['anepy', 'train', '--help']\n"
        "from anepy.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "found = {'numpy', 'rich', 'requests', 'anepy.native.find'} & set(sys.modules)\n"
        "print(found, file=sys.stderr)"
    )
    done = children.run("-c", code)
    assert done.stderr.strip() == "set()" and "--steps" in done.stdout


def test_version_is_printed(run: Run) -> None:
    import anepy

    assert run("--version") == Result(0, f"anepy {anepy.__version__}\n", "")


def test_shells_can_complete_commands_and_options() -> None:
    for typed, expected in (("anepy ge", "generate"), ("anepy train --hel", "--held-out --help")):
        done = children.run(
            "-c", "import sys; sys.argv = ['anepy']; from anepy.cli.main import main; main()",
            _ANEPY_COMPLETE="complete_bash", COMP_WORDS=typed,
            COMP_CWORD=str(typed.count(" ")),
        )  # fmt: skip
        assert sorted(done.stdout.split()) == expected.split(), done


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["train", "--nonsense"],
        ["train", "--steps", "many"],
        ["train", "a.bin", "--model", "b.bin"],
        ["train", "--checkpoint", "a.npz", "--no-checkpoint"],
        ["generate"],
        ["init", "stories15M"],
    ],
)
def test_wrong_usage_exits_with_2(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert result.code == 2 and result.out == "" and "Usage:" in result.err


# train


def test_train_writes_checkpoint_model_and_log(run: Run, files: dict[str, Path]) -> None:
    result = run(
        "train", "m.bin", "--data", "d.bin", "--steps", 6, "--accum", 2, "--seq", 16,
        "--ckpt", "c.npz", "--save", "new.bin", "--log", "log.jsonl", "--held-out", 0.2,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "step 6 " in result.out and "Total steps:     6" in result.out
    new, old = Model.load("new.bin"), Model.load("m.bin")
    assert not np.array_equal(new.weights["norm.weight"], old.weights["norm.weight"])
    with np.load("c.npz") as checkpoint:
        np.testing.assert_array_equal(checkpoint["norm.weight"], new.weights["norm.weight"])
    records = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["type"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_train_default_checkpoint_is_named_after_the_model(
    run: Run, files: dict[str, Path], tmp_path: Path
) -> None:
    words = ["train", "--model", "m.bin", "--data", "d.bin", "--steps", 2, "--seq", 16]
    assert run(*words).code == 0
    assert (tmp_path / "m.ckpt.npz").is_file()
    again = run(*words)
    assert again.code == 0 and "will be replaced" in again.err
    (tmp_path / "m.ckpt.npz").unlink()
    assert run(*words, "--no-checkpoint").code == 0
    assert not (tmp_path / "m.ckpt.npz").exists()


def test_train_json_is_alone_on_standard_output(run: Run, files: dict[str, Path]) -> None:
    result = run("train", "m.bin", "--data", "d.bin", "--steps", 3, "--seq", 16, "--json")
    assert result.code == 0 and result.err == ""
    record = json.loads(result.out)
    assert record["summary"]["steps"] == 3 and record["interrupted"] is False
    assert record["settings"]["seq"] == 16 and record["engine"]["device"] == "cpu"
    assert record["checkpoint"] == "m.ckpt.npz"
    assert record["summary"]["peak"]["name"] == "measured FMA peak"
    assert 0 < record["summary"]["utilization"]
    assert record["summary"]["phases"]["forward"] > 0 < record["summary"]["phases"]["backward"]


def test_train_with_frozen_tensors_says_so_and_resumes(run: Run, files: dict[str, Path]) -> None:
    words = ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 2, "--save", "new.bin"]
    freeze = ["--freeze", "layers.0.*", "--freeze", "norm*"]
    before = Model.load("m.bin").weights
    trained = len(before) - sum(n.startswith(("layers.0.", "norm")) for n in before)
    result = run(*words, "--steps", 4, *freeze)
    assert result.code == 0, result.err
    assert f"Trains: {trained} of {len(before)} tensors, " in result.out
    assert run(*words, "--steps", 6, "--resume").code == 0  # as the checkpoint has it
    resumed = {name: np.array(value) for name, value in Model.load("new.bin").weights.items()}
    for name, value in resumed.items():
        frozen = name.startswith(("layers.0.", "norm"))
        assert np.array_equal(value, before[name]) == frozen, name
    assert run(*words, "--steps", 6, "--checkpoint", "whole.npz", *freeze).code == 0
    for name, value in Model.load("new.bin").weights.items():
        assert value.tobytes() == resumed[name].tobytes(), name
    other = run(*words, "--steps", 8, "--resume", "--freeze", "norm*")
    assert_one_line_error(other, "m.ckpt.npz", "freeze the same tensors")
    assert_one_line_error(run(*words, "--freeze", "layer.*"), "'layer.*'", "no tensor is named")


def test_train_with_recompute_says_so_and_writes_the_same_model(
    run: Run, files: dict[str, Path]
) -> None:
    words = ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 2]
    assert run(*words, "--steps", 6, "--save", "kept.bin", "--checkpoint", "kept.npz").code == 0
    result = run(*words, "--steps", 4, "--recompute")
    assert result.code == 0, result.err
    assert "computed again" in result.out
    assert run(*words, "--steps", 6, "--resume", "--save", "again.bin").code == 0
    assert Path("again.bin").read_bytes() == Path("kept.bin").read_bytes()
    assert "computed again" not in run(*words, "--steps", 1, "--no-checkpoint").out


@pytest.mark.parametrize(
    "spelling",
    [
        ["m.bin", "--resume"],
        ["--resume", "m.bin"],
        ["m.bin", "--resume", "m.ckpt.npz"],
        ["m.bin", "--resume=m.ckpt.npz"],
        ["--resume", "m.ckpt.npz"],
        ["m.bin", "--resume", "--ckpt", "m.ckpt.npz"],
    ],
)
def test_train_resume_in_every_spelling_equals_one_run(
    run: Run, files: dict[str, Path], spelling: list[str]
) -> None:
    common = ["--data", "d.bin", "--accum", 2, "--seq", 16, "--lr", 0.01]
    assert (
        run("train", "m.bin", *common, "--steps", 8, "--no-checkpoint", "--save", "a.bin")[0] == 0
    )
    assert run("train", "m.bin", *common, "--steps", 4).code == 0
    # Settings, data and model come from the checkpoint where they are not given.
    result = run("train", *spelling, "--steps", 8, "--save", "b.bin")
    assert result.code == 0, result.err
    assert "[RESUMED step 4, loss=" in result.out
    assert Path("a.bin").read_bytes() == Path("b.bin").read_bytes()


def test_train_moments_in_bf16_resume_with_the_same_bits(run: Run, files: dict[str, Path]) -> None:
    words = ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 1, "--moments", "bf16"]
    assert run(*words, "--steps", 8, "--save", "once.bin", "--ckpt", "once.npz").code == 0
    assert run(*words, "--steps", 5, "--ckpt", "two.npz").code == 0
    result = run("train", "--resume", "two.npz", "--steps", 8, "--save", "two.bin")
    assert result.code == 0 and "moments in bf16" in result.out, result.err
    assert Path("once.bin").read_bytes() == Path("two.bin").read_bytes()
    weights = Path("once.bin").stat().st_size
    assert Path("once.npz").stat().st_size < 2.4 * weights  # 3 times with moments in float32
    again = run("train", "--resume", "two.npz", "--steps", 9, "--moments", "f32")
    assert_one_line_error(again, "two.npz", "--moments bf16")
    # Elsewhere they are float32, with the same values.
    assert run("convert", "two.npz", "wide.npz").code == 0
    with np.load("two.npz") as halves, np.load("wide.npz") as wide:
        name = "v.layers.0.attention.wq.weight"
        assert wide[name].any()
        assert (wide[name].view(np.uint32) == halves[name].astype(np.uint32) << 16).all()
    assert run("train", "--resume", "wide.npz", "--data", "d.bin", "--steps", 9).code == 0


def test_train_resume_of_a_finished_run_says_what_to_do(run: Run, files: dict[str, Path]) -> None:
    assert run("train", "m.bin", "--data", "d.bin", "--steps", 2, "--seq", 16).code == 0
    assert_one_line_error(run("train", "m.bin", "--resume"), "step 2 of 2", "--steps")


def test_train_resume_appends_to_the_log(run: Run, files: dict[str, Path]) -> None:
    words = ["train", "m.bin", "--log", "l.jsonl", "--seq", 16, "--data", "d.bin"]
    assert run(*words, "--steps", 2).code == 0
    assert run(*words, "--steps", 4, "--resume").code == 0
    records = [json.loads(line) for line in Path("l.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["type"] == "step"] == [1, 2, 3, 4]


def test_train_without_data_tells_how_to_make_some(run: Run, files: dict[str, Path]) -> None:
    assert_one_line_error(run("train", "m.bin"), "--data", "anepy prepare")
    assert_one_line_error(run("train", "--data", "d.bin"), "train MODEL", "anepy init")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--variant", "nonsense"], ["nonsense"]),
        (["--variant", "opt+nonsense"], ["nonsense"]),
        (["--device", "toaster"], ["toaster"]),
        (["--device", "cpu:threads=4"], ["device cpu takes no details"]),
        (["--precision", "fp7"], ["fp7"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--schedule", "cubic"], ["constant or linear or cosine or wsd"]),
        (["--seq", "33"], ["context is 32"]),
        (["--resume", "missing.npz"], ["missing.npz"]),
        (["--resume"], ["m.ckpt.npz"]),
        (["--checkpoint", "no/folder/c.npz"], ["no/folder"]),
        (["--save", "no/folder/m.bin"], ["no/folder"]),
        (["--log", "no/folder/l.jsonl"], ["no/folder"]),
        (["--checkpoint", "/dev/null"], ["regular file"]),
        (["--checkpoint", "d.bin"], ["same file"]),
        (["--save", "x.npz", "--checkpoint", "x.npz"], ["same file"]),
        (["--data", "odd.bin"], ["odd.bin"]),
        (["--data", "empty.bin"], ["empty.bin"]),
        (["--data", "short.bin"], ["short.bin"]),
        (["--data", "beyond.bin"], ["beyond.bin", "259"]),
        (["--data", "missing.bin"], ["missing.bin"]),
    ],
)
def test_train_bad_input_is_one_line_and_writes_nothing(
    run: Run, files: dict[str, Path], tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    (tmp_path / "odd.bin").write_bytes(b"\1" * 333)
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "short.bin").write_bytes(b"\1\0" * 5)
    (tmp_path / "beyond.bin").write_bytes(b"\3\1" * 500)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    data = [] if "--data" in words else ["--data", "d.bin"]
    assert_one_line_error(run("train", "m.bin", *data, *words), *parts)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@needs.NO_MAC
def test_train_apple_hardware_elsewhere_says_why(run: Run, files: dict[str, Path]) -> None:
    words = ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--steps", 2]
    assert_one_line_error(run(*words, "--device", "ane"), "ane", "macOS")
    assert_one_line_error(run(*words, "--metal"), "macOS")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-4], lambda raw: raw + b"\0" * 12])
def test_train_model_of_wrong_size_is_one_line(
    run: Run, files: dict[str, Path], damage: Callable[[bytes], bytes]
) -> None:
    files["m.bin"].write_bytes(damage(files["m.bin"].read_bytes()))
    assert_one_line_error(run("train", "m.bin", "--data", "d.bin"), "m.bin")


def test_train_demo_learns_and_samples(run: Run, tmp_path: Path) -> None:
    result = run("train", "--steps", 300, "--json")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    summary = record["summary"]
    assert summary["held_out_before"] == pytest.approx(math.log(259), rel=0.05)
    # Letter frequencies alone give about 2.9; words have been learned below 1.5.
    assert summary["held_out_after"] < 1.5
    assert record["sample"].startswith("Once upon a time")
    assert not list(tmp_path.iterdir()), "a demo leaves nothing behind"


def test_train_demo_can_be_saved_and_used(run: Run) -> None:
    assert run("train", "--steps", 2, "--save", "demo.bin").code == 0
    result = run("generate", "demo.bin", "-p", "Once", "-n", 5)
    assert result.code == 0 and result.out.startswith("Once")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_train_signal_saves_and_resume_equals_one_run(
    run: Run, files: dict[str, Path], tmp_path: Path, number: int, code: int
) -> None:
    common = ["--data", "d.bin", "--accum", 7, "--seq", 16]
    process = start(tmp_path, "train", "m.bin", *common, "--steps", 10**6)
    wait_for_step(process, 1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "finishing this step" in err
    assert "continue with:\n  anepy train m.bin --resume m.ckpt.npz\n" in out
    with np.load("m.ckpt.npz") as checkpoint:
        step = json.loads(str(checkpoint["meta"]))["step"]
    assert f"interrupted after step {step} of 1000000" in out
    words = ["train", "m.bin", "--steps", step + 10]
    assert run(*words, "--resume", "--save", "b.bin").code == 0
    assert run(*words, *common, "--no-checkpoint", "--save", "a.bin").code == 0
    assert Path("a.bin").read_bytes() == Path("b.bin").read_bytes()


def test_train_told_to_ignore_ctrl_c_saves_when_terminated(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """As under nohup, or with `&` in a script, where Ctrl-C is meant for something else."""
    words = ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--steps", 10**6]
    ignoring = children.UNINTERRUPTED
    process = children.start("-m", "anepy", *words, cwd=tmp_path, before=ignoring)
    wait_for_step(process, 1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "continue with:\n  anepy train m.bin --resume m.ckpt.npz\n" in out


def test_train_interrupt_with_full_disk_keeps_the_old_checkpoint(
    files: dict[str, Path], tmp_path: Path
) -> None:
    common = ["m.bin", "--data", "d.bin", "--seq", 16]
    first = start(tmp_path, "train", *common, "--steps", 2)
    assert first.wait() == 0
    before = (tmp_path / "m.ckpt.npz").read_bytes()
    # A limit on the size of files, set once training has begun, fails like a full disk.
    code = (
        "import resource, sys\n"
        "from anepy.cli import main as cli\n"
        "from anepy.training import trainer\n"
        "step = trainer.Trainer.run_step\n"
        "def limited(self):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))\n"
        "    return step(self)\n"
        "trainer.Trainer.run_step = limited\n"
        "cli.main()"
    )
    process = children.start("-c", code, "train", *common, "--steps", 100000, cwd=tmp_path)
    wait_for_step(process, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    errors = [line for line in err.splitlines() if line.startswith("anepy: error: ")]
    assert len(errors) == 1 and "free some space" in errors[0]
    assert "Traceback" not in err
    assert (tmp_path / "m.ckpt.npz").read_bytes() == before
    assert not list(tmp_path.glob(".anepy*"))


def test_train_second_interrupt_ends_at_once(files: dict[str, Path], tmp_path: Path) -> None:
    # A step that does not return to Python stands for a very long one.
    code = (
        "import time\n"
        "from anepy.cli import main as cli\n"
        "from anepy.training import trainer\n"
        "def stuck(self):\n"
        "    print('step 1', flush=True)\n"
        "    for _ in range(600):\n"
        "        time.sleep(0.1)\n"
        "trainer.Trainer.run_step = stuck\n"
        "cli.main()"
    )
    words = ["train", "m.bin", "--data", "d.bin", "--seq", 16]
    process = children.start("-c", code, *words, cwd=tmp_path)
    wait_for_step(process, 1)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None, "the first Ctrl-C waits for the step"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "m.bin", "t.txt"]
    assert "stopped at once; nothing of this run was saved" in process.communicate()[1]


# The other commands


def test_init_writes_a_preset_and_never_overwrites(run: Run, tmp_path: Path) -> None:
    assert run("init", "stories260K", "-o", "a.bin", "--seed", 0).code == 0
    first = (tmp_path / "a.bin").read_bytes()
    assert_one_line_error(run("init", "stories260K", "-o", "a.bin", "-s", 5), "a.bin", "--force")
    assert (tmp_path / "a.bin").read_bytes() == first
    assert run("init", "stories260K", "-o", "a.bin", "--force", "--seed", 5).code == 0
    assert (tmp_path / "a.bin").read_bytes() != first
    assert Model.load("a.bin").config.vocab_size == 512
    assert_one_line_error(run("init", "stories1B", "-o", "b.bin"), "stories1B", "stories15M")
    assert_one_line_error(run("init", "stories260K", "-o", "no/b.bin"), "no/b.bin")


def test_prepare_then_train(run: Run, files: dict[str, Path]) -> None:
    result = run("prepare", "t.txt", "-o", "p.bin", "--tokenizer", "bytes", "--json")
    assert result.code == 0
    record = json.loads(result.out)
    assert record["documents"] == 2 and record["vocab_size"] == 259
    assert Path("p.bin").stat().st_size == 2 * record["tokens"]
    assert run("train", "m.bin", "--data", "p.bin", "--steps", 1, "--seq", 16).code == 0
    assert_one_line_error(
        run("prepare", "t.txt", "-o", "q.bin", "--tokenizer", "missing.bin"), "missing.bin"
    )


def test_info_describes_machine_library_and_devices(run: Run) -> None:
    record = json.loads(run("info", "--json").out)
    assert record["machine"]["cpus"] >= 1 and record["machine"]["memory"] > 0
    devices = {device["name"]: device for device in record["devices"]}
    assert devices["cpu"]["usable"]
    assert all(device["usable"] or device["reason"] for device in devices.values())
    assert "baseline" in record["variants"] and record["library"]
    shown = run("info")
    assert shown.code == 0 and "device cpu:" in shown.out


def test_info_is_all_that_a_report_needs_and_names_no_home(tmp_path: Path) -> None:
    home = tmp_path / "home" / "ada"
    home.mkdir(parents=True)
    shutil.copy(find.library()._name, home / "libanepy.so")
    places = {"HOME": str(home), "ANEPY_LIB": f"{home}/libanepy.so", "ANEPY_CPU_MASK": "scalar"}
    process = start(tmp_path, "info", "--json", ANEPY_CACHE=f"{home}/cache", **places)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert str(home) not in out
    record = json.loads(out)
    assert record["library"]["path"] == "~/libanepy.so" and record["library"]["isa"] == "scalar"
    assert record["library"]["why"] == "chosen by ANEPY_LIB, not checked"
    assert len(record["library"]["sha256"]) == 64 and record["cache"] == "~/cache"
    assert record["environment"]["ANEPY_CPU_MASK"] == "scalar"
    assert record["places"] == [
        {
            "place": "ANEPY_LIB",
            "path": "~/libanepy.so",
            "status": "usable",
            "reason": "chosen by ANEPY_LIB, not checked",
        }
    ]


def test_info_without_library_still_answers(tmp_path: Path) -> None:
    process = start(tmp_path, "info", "--json", ANEPY_LIB=str(tmp_path / "missing.so"))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    record = json.loads(out)
    assert "missing.so" in record["library"]["error"] and record["environment"]["ANEPY_LIB"]


def test_lib_path_names_the_library_in_use(run: Run) -> None:
    run("info")
    result = run("lib", "path")
    assert result.code == 0 and Path(result.out.strip()).is_file()
    checked = run("lib", "verify", result.out.strip(), "--json")
    assert checked.code == 0 and json.loads(checked.out)["ok"] is True


def test_lib_verify_of_another_file_exits_with_1(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"not a library")
    result = run("lib", "verify", "x.so")
    assert result.code == 1 and "x.so" in result.out


def test_closed_pipe_is_quiet(tmp_path: Path) -> None:
    process = start(tmp_path, "train", "--steps", 40)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.wait()
    assert "Traceback" not in err and "BrokenPipe" not in err
