"""A board by a real ssh and sshd, a phone by the real adb client: a real GGUF, in llama.cpp, measured over both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest

from demos import llama_cpp, tool
from edgekd.benchmarks.devices import readings
from edgekd.benchmarks.devices.bench import choose_runner
from edgekd.benchmarks.devices.device import Ssh, ask, connect
from edgekd.benchmarks.devices.others import Job, llama_bench, llama_main
from edgekd.benchmarks.devices.place import Place, check_program, read_program
from edgekd.benchmarks.history import read_history
from edgekd.benchmarks.report.history import key_of
from edgekd.errors import EdgekdError
from edgekd.proof import Host
from edgekd.spec import BenchSpec
from typed import edgekd

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "benchmarks" / "devices" / "runner"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sh, sshd and ELF as Linux has them")
QUICK = ("--runs", "2", "--cold-runs", "1", "--curve-seconds", "0", "--energy-seconds", "0", "--threads", "1")
LENGTHS = ("--prompt-tokens", "8", "--prompt-tokens", "24", "--decode-tokens", "8")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, export_gguf):
    folder = tmp_path_factory.mktemp("run")
    return export_gguf(folder / "student", folder / "gguf-int8", "tiny", "Llama", max_position_embeddings=512)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """``edgekd-llama``, built against the llama.cpp of the wheel."""
    compiler, (headers, libraries) = tool("g++", "c++", get="apt install g++"), llama_cpp()
    out = tmp_path_factory.mktemp("runner") / "edgekd-llama"
    words = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{headers}", RUNNER / "edgekd-llama.cpp"]
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base", "-o", out]
    subprocess.run([compiler, *words, *links], check=True)
    return out


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home of the board"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []  # whatever happened


@pytest.fixture
def board(tmp_path, home, monkeypatch):
    from loopback_ssh import Board, why_not

    if reason := why_not():
        pytest.skip(reason)
    board = Board(tmp_path / "board", home=home)
    monkeypatch.setenv("PATH", f"{board.bin}{os.pathsep}{os.environ['PATH']}")
    yield board
    board.stop()


@pytest.fixture
def phone(tmp_path, monkeypatch):
    from scripted_adb import Phone

    if not shutil.which("adb"):
        pytest.skip("adb is not installed")
    phone = Phone(tmp_path / "phone")
    for name, value in phone.environment.items():
        monkeypatch.setenv(name, value)
    yield phone
    phone.stop()
    assert list((phone.root / "tmp").iterdir()) == []  # whatever happened


# --- a board ----------------------------------------------------------------------------------------------------------


def test_a_board_measures_what_this_machine_would(artifact, runner, board, tmp_path):
    history = tmp_path / "history.jsonl"
    manifest = (artifact.folder / "manifest.json").read_bytes()
    words = ("bench", artifact.folder, "--device", "ssh:board", "--runner", runner, *LENGTHS)
    code, out, err = edgekd(*words, *QUICK[:4], "--curve-seconds", "60", *QUICK[6:], "--history", history, "--json")
    assert code == 0, err
    told = json.loads(out)
    for key in ("load_s", "cold_ttft_s", "first_ttft_s", "itl_s", "decode_tokens_per_s", "icl_p99_s", "peak_rss_bytes"):
        assert told[key]["value"] > 0, key
    assert len(told["ttft_s"]["24"]["samples"]) == 2
    assert told["cold_ttft_s"]["value"] > told["ttft_s"]["8"]["value"] > told["first_token_s"]["8"]["value"] > 0
    assert list(told["decode_curve_tokens_per_s"]) == ["32", "128", "496"]
    assert all(figure["value"] > 0 for figure in told["ttft_curve_s"].values())
    for phase in ("load", "prefill", "decode"):
        assert told["memory"][phase]["anonymous_bytes"]["value"] > 0
    assert told["bandwidth_bytes_per_s"]["value"] is None and "not measured" in told["bandwidth_bytes_per_s"]["reason"]
    assert told["machine"]["runtime_build"].startswith("edgekd-llama, llama.cpp ") and told["machine"]["device"]
    assert "sha256" in told["machine"]["runtime_build"] and told["machine"]["architecture"] == os.uname().machine
    (record,) = read_history(history)
    assert told["machine"]["device"] in key_of(record) and told["machine"]["runtime_build"] in key_of(record)
    assert (artifact.folder / "manifest.json").read_bytes() == manifest  # the proof is of this machine


@pytest.mark.slow
def test_two_artifacts_are_compared_on_a_board(artifact, runner, board):
    words = ("compare", artifact.folder, artifact.folder, "--device", "ssh:board", "--runner", runner)
    code, out, err = edgekd(
        *words, "--blocks", "9", "--prompt-tokens", "8", "--decode-tokens", "4", "--threads", "1", "--json"
    )
    assert code in (0, 1), err  # so short a run may look slower
    told = json.loads(out)
    assert told["blocks"] == 9 and len(told["figures"][0]["samples_b"]) == 9 and told["figures"][0]["a"] > 0
    code, out, err = edgekd(*words[:-1], runner.with_name("nothing"), "--blocks", "9")
    assert code == 2 and out == "" and "is none of" in err


def test_the_runner_writes_what_the_session_writes(artifact, runner, tmp_path):
    from edgekd.benchmarks.definitions import real_text, serve
    from edgekd.targets import open_artifact

    session = open_artifact(artifact, threads=1)
    text = real_text(session, 40)
    expected = list(session.generate(session.tokenize(text), 12))
    chunks = len(serve(session, text, 12).chunks)
    session.close()
    (tmp_path / "prompt").write_text(text)
    (tmp_path / "special").write_text(" ".join(map(str, artifact.manifest.contract.special_ids.values())))
    words = [runner, artifact.main_file, "512", "1", "16", tmp_path / "special", f"serve:{tmp_path / 'prompt'}:12"]
    lines = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()
    told = json.loads(lines[2])
    assert told["prompt_tokens"] == 40 and len(told["chosen"]) == 13 == len(told["decoded"]) + 1
    assert told["tokens"][: len(expected)] == expected and len(expected) >= 1
    assert len(told["chunks"]) == chunks
    clock = [told["text_in"], told["ids_ready"], told["prefilled"], *told["chosen"]]
    assert clock == sorted(clock)
    assert json.loads(lines[-1])["started"] < told["text_in"]


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("ssh:-oProxyCommand=x", "is no host"),
        ("ssh:me@-oProxyCommand=x", "is no host"),
        ("ssh:a b", "is no host"),
        ("ssh:", "is no host"),
        ("ssh:stranger", "Host key verification failed"),
        ("ssh:closed", "Connection refused"),
        ("usb:1", "no such kind of device"),
        ("adb:-x", "is no serial number"),
    ],
)
def test_what_is_no_device_is_one_sentence(artifact, runner, board, device, said):
    if device.startswith("adb") and not shutil.which("adb"):
        pytest.skip("adb is not installed")
    code, out, err = edgekd("bench", artifact.folder, "--device", device, "--runner", runner)
    assert code == 2 and said in err and "Traceback" not in err and out == ""


def test_a_name_reaches_no_shell(board, home):
    device = Ssh("board")
    place = Place(device, f"{home}")
    odd = 'a\'b "c" $(touch hit) ; touch hit #'
    file = home.parent / odd
    file.write_bytes(b"1")
    place.push(file, odd)
    assert (home / odd).read_bytes() == b"1" and [path.name for path in home.iterdir()] == [odd]
    (home / odd).unlink()


def test_a_script_that_fails_is_no_lost_device(board):
    with pytest.raises(EdgekdError, match="ssh:board: no way") as caught:
        ask(connect("ssh:board"), "echo no way >&2; exit 3")
    assert type(caught.value) is EdgekdError


def test_a_board_that_is_left_removes_what_was_sent(artifact, runner, board, home):
    """Ctrl-C here, and a killed edgekd, which can remove nothing itself."""
    words = ["bench", artifact.folder, "--device", "ssh:board", "--runner", runner, *QUICK, "--runs", "500"]
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", "from edgekd.cli import main; main()", *map(str, words)],
            stderr=subprocess.PIPE,
            text=True,
        )
        _await(lambda: any(home.glob(".edgekd.*/out")))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        _await(lambda: not any(home.iterdir()))
        assert process.returncode != 0 and "Traceback" not in err


def _await(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_runner_that_dies_is_one_sentence(artifact, board, tmp_path, runner):
    words = ("bench", artifact.folder, "--device", "ssh:board", *QUICK)
    broken = tmp_path / "edgekd-llama"
    broken.write_bytes(runner.read_bytes()[:4096])  # an ELF head, and nothing behind it
    code, out, err = edgekd(*words, "--runner", broken)
    assert code == 2 and "the runner" in err and "Traceback" not in err and out == ""


# --- a phone ----------------------------------------------------------------------------------------------------------


class _Battery:
    """One that gives 3.96 to 4.04 W, another each time it is looked at."""

    def __init__(self, phone, *, status="Discharging"):
        self._folder = phone.root / "power_supply" / "battery"
        self._folder.mkdir()
        for name, value in {
            "type": "Battery",
            "status": status,
            "voltage_now": 4_000_000,
            "current_now": -1_000_000,
        }.items():
            (self._folder / name).write_text(f"{value}\n")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._drain)

    def _drain(self):
        for step in count():
            current = -990_000 - 1_000 * (8 * step % 21)
            fresh = self._folder / "next"
            fresh.write_text(f"{current}\n")
            fresh.replace(self._folder / "current_now")
            if self._stop.wait(0.05):
                return

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def _bench_for_energy(artifact, runner, seconds):
    words = ("bench", artifact.folder, "--device", "adb", "--runner", runner, *LENGTHS, *QUICK[:6], "--threads", "1")
    return edgekd(*words, "--energy-seconds", str(seconds), "--json")


def test_a_phone_tells_its_name_temperature_and_energy(artifact, runner, phone):
    with _Battery(phone):
        code, out, err = _bench_for_energy(artifact, runner, seconds=4)
    assert code == 0, err
    told = json.loads(out)
    assert told["machine"]["device"] == "Acme Anvil 7" and told["machine"]["os"] == "Android 16"
    assert told["noise"]["temperature_c"] == [41.5, 41.5]
    energy = told["decode_energy_j_per_token"]
    assert energy["counters"] == ["battery"] and energy["source"] == "measured:battery", energy
    # Steady power: idling draws as much as decoding.
    assert energy["idle_w"] == pytest.approx([4.0, 4.0], abs=0.03)
    assert energy["gross"] > 0 and abs(energy["value"]) < 0.02 * energy["gross"]
    assert energy["counter_updates"] >= 20


def test_a_phone_on_its_cable_has_no_energy(artifact, runner, phone):
    phone.program("dumpsys", "echo '  USB powered: true'; echo '  temperature: 312'")
    with _Battery(phone, status="Charging"):
        code, out, err = _bench_for_energy(artifact, runner, seconds=1)
    assert code == 0, err
    energy = json.loads(out)["decode_energy_j_per_token"]
    assert energy["value"] is None and energy["gross"] is None and "charged or relieved (USB)" in energy["reason"]


def test_a_cable_that_is_pulled_is_one_sentence(artifact, runner, phone):
    phone.cut_at = "serve:"
    code, out, err = edgekd("bench", artifact.folder, "--device", "adb", "--runner", runner, *LENGTHS, *QUICK)
    assert code == 2 and out == "" and "Traceback" not in err
    assert "adb:R5CT10 is gone" in err and "remove it" in err
    # The phone has seen the end of its input, and cleans up without us.
    _await(lambda: not any((phone.root / "tmp").iterdir()))


@pytest.mark.parametrize(
    ("attached", "device", "said"),
    [
        ({}, "adb", "adb: no device is attached"),
        ({"A1": "device", "B2": "device"}, "adb", "2 devices are attached: A1, B2. Name one"),
        ({"A1": "unauthorized"}, "adb", "adb:A1 has not allowed this computer. Unlock its screen"),
        ({"A1": "offline"}, "adb", "adb:A1 is offline"),
        ({"A1": "device"}, "adb:B2", "adb:B2 is not attached"),
    ],
)
def test_phones_that_are_not_there(artifact, runner, phone, attached, device, said):
    phone.attached = attached
    code, out, err = edgekd("bench", artifact.folder, "--device", device, "--runner", runner)
    assert code == 2 and said in err and out == ""


def test_what_a_phone_refuses_before_it_runs(artifact, runner, phone):
    words = ("bench", artifact.folder, "--device", "adb", "--runner", runner, *QUICK, *LENGTHS)
    phone.damage = True
    code, _, err = edgekd(*words)
    assert code == 2 and "arrived as another file" in err
    phone.damage = False
    phone.program("df", "echo Filesystem; echo '/dev/x 100 99 1 99% /data'")
    code, _, err = edgekd(*words)
    assert code == 2 and "1.02 kB are free there" in err
    phone.program("uname", 'test "$1" = -m && echo armv7l || /bin/uname "$@"')
    code, _, err = edgekd(*words)
    assert code == 2 and "the device is armv7l" in err


def test_without_adb(artifact, runner, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, _, err = edgekd("bench", artifact.folder, "--device", "adb", "--runner", runner)
    assert code == 2 and "adb is not installed. Install Android's platform-tools" in err


# --- before anything is sent ------------------------------------------------------------------------------------------


def test_a_damaged_artifact_goes_nowhere(artifact, runner, phone, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(artifact.folder, folder)
    with (folder / "model.gguf").open("r+b") as file:
        last = file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(last)
        file.write(bytes([byte ^ 1]))
    code, _, err = edgekd("bench", folder, "--device", "adb", "--runner", runner)
    assert code == 2 and "is not the file its manifest names" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "adb"), "--device and --runner belong together"),
        (("--runner", "x"), "--device and --runner belong together"),
        (("--device", "adb", "--runner", "x", "--profile", "laptop"), "Leave one of them out"),
        (("--device", "adb", "--runner", "nowhere"), "is none of edgekd-llama, llama-bench, llama_main"),
        (("--device", "adb", "--runner", "llama-bench"), "cannot be read"),
    ],
)
def test_words_that_do_not_fit(artifact, words, said):
    code, out, err = edgekd("bench", artifact.folder, *words)
    assert code == 2 and said in err and out == ""


def _elf(machine, loader=None, wide=True):
    """The head of a program, by the ELF specification."""
    head = bytearray(512)
    head[:6] = b"\x7fELF" + bytes([2 if wide else 1, 1])
    head[18:20] = machine.to_bytes(2, "little")
    if loader:
        table, size, count = (32, 54, 56) if wide else (28, 42, 44)
        head[table : table + 2] = (128).to_bytes(2, "little")
        head[size : size + 2], head[count : count + 2] = (56 if wide else 32).to_bytes(2, "little"), b"\x01\0"
        head[128] = 3
        offset, length = (136, 160) if wide else (132, 144)
        head[offset : offset + 2] = (256).to_bytes(2, "little")
        head[length : length + 2] = (len(loader) + 1).to_bytes(2, "little")
        head[256 : 256 + len(loader)] = loader.encode()
    return bytes(head)


def test_the_machine_of_a_program(tmp_path):
    path = tmp_path / "edgekd-llama"
    for wide in (True, False):
        path.write_bytes(_elf(183 if wide else 40, "/system/bin/linker", wide))
        program = read_program(path)
        assert program.loader == "/system/bin/linker"
        machine = {"machine": "aarch64" if wide else "armv7l"}
        check_program(path, program, machine, lambda name: name == "/system/bin/linker")
        with pytest.raises(EdgekdError, match="built for another system"):
            check_program(path, program, machine, lambda name: False)
        with pytest.raises(EdgekdError, match="and the device is x86_64"):
            check_program(path, program, {"machine": "x86_64"}, lambda name: True)
    path.write_bytes(Path(sys.executable).resolve().read_bytes())
    assert os.uname().machine in ("x86_64", "aarch64") and read_program(path).loader.startswith("/lib")
    path.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(EdgekdError, match="is no program of Linux or Android"):
        read_program(path)


def test_a_runner_knows_its_target(make_artifact, tmp_path):
    for name in ("edgekd-llama", "llama_main"):
        (tmp_path / name).write_bytes(_elf(62))
    pte = make_artifact("a", target="executorch")
    assert choose_runner(tmp_path / "llama_main", [pte]).name == "llama_main"
    with pytest.raises(EdgekdError, match="Take llama_main"):
        choose_runner(tmp_path / "edgekd-llama", [pte])
    with pytest.raises(EdgekdError, match="Its app measures it"):
        choose_runner(tmp_path / "llama_main", [make_artifact("b", target="coreml")])


# --- readings ---------------------------------------------------------------------------------------------------------


def test_a_window_is_the_area_under_the_power():
    """1 W until 10 s, then 3 W, told once a second: in 5 to 15 s that is 5 + 15 J, less the slope between 9 and 10."""
    ticks = [
        readings.tick_of(f"tick {t} 8 4 4 0 {-250000 if t < 10 else -750000} 4000000 Discharging") for t in range(20)
    ]
    window = readings.window_of(ticks, [5.0, 15.0], 10)
    assert window.joules == pytest.approx(4 + 2 + 5 * 3) and window.seconds == 10 and window.updates == 1
    assert readings.window_of(ticks, [2.0, 4.0, 12.0, 14.0], 1).joules == pytest.approx(2 * 1 + 2 * 3)
    assert ticks[0].peak_rss == 8192 and not readings.charged_meanwhile(ticks)
    assert readings.charged_meanwhile([readings.tick_of("tick 1 - - - - - - Charging")])


@pytest.mark.parametrize(
    ("said", "battery", "why"),
    [
        ("supply /s/battery Battery - -250000 Discharging\n", "/s/battery", ""),
        ("supply /s/battery Battery - -250000 Discharging\nsupply /s/usb USB 1 - -\n", None, "unplug it"),
        ("supply /s/battery Battery - -250000 Discharging\nbattery AC powered: true\n", None, "unplug it"),
        ("supply /s/battery Battery - 250000 Not\n", None, "not being discharged"),
        ("supply /s/battery Battery - - Discharging\n", None, "not readable"),
        ("battery temperature: 312\n", None, "not readable"),
        ("", None, "has no battery"),
    ],
)
def test_a_battery_counts_while_it_alone_feeds_the_device(said, battery, why):
    found, reason = readings.battery_of(readings.state_of(said))
    assert found == battery and why in reason


def test_temperatures_that_are_none_are_left_out():
    state = readings.state_of("zone 0\nzone 412\nzone 45100\nzone 999000\nzone -40000\nbattery temperature: 312\n")
    assert state.hottest_c == 45.1
    assert readings.state_of("battery temperature: 312\n").hottest_c == 31.2


# --- other people's runners -------------------------------------------------------------------------------------------


@pytest.fixture
def job(artifact, board, home):
    """A job on the board, whose runner is a script: what it says is what the runner's source says it says."""

    def make(script):
        folder = home / "job"
        folder.mkdir()
        runner = folder / "runner"
        runner.write_text(f"#!/bin/sh\n{script}\n")
        runner.chmod(0o755)
        shutil.copy(ROOT / "benchmarks" / "devices" / "watch.sh", folder)
        prompts = {}
        for tokens in (8, 24):
            prompts[tokens] = str(folder / f"prompt-{tokens}")
            Path(prompts[tokens]).write_text(f"it's {tokens} $HOME\n\n")
        place, spec = Place(Ssh("board"), str(folder)), BenchSpec(prompt_tokens=[8, 24], decode_tokens=6, runs=3)
        files = {"model.gguf": str(folder / "model"), "tokenizer.json": str(folder / "tokenizer")}
        return Job(
            place, str(runner), files, prompts, artifact, spec, 2, Host(device="board", runtime_build="sha256 0")
        )

    yield make
    shutil.rmtree(home / "job", ignore_errors=True)


def test_llama_bench_tells_prefill_and_decode(job):
    def row(prompt, tokens, nanoseconds):
        told = {"build_commit": "abc", "build_number": 7, "backends": "CPU", "n_prompt": prompt, "n_gen": tokens}
        return json.dumps(told | {"samples_ns": [nanoseconds]})

    prefill, decode = f"[{row(8, 0, 10**7)},{row(24, 0, 10**8)}]", f"[{row(0, 6, 2 * 10**8)}]"
    script = f"case \"$*\" in *'-n 0'*) echo '{prefill}';; *'-p 0 -n 6 -d 24'*) echo '{decode}';; *) exit 9;; esac"
    told = llama_bench(job(f"sleep 0.7; {script}"))
    assert told.prefill_tokens_per_s["8"].samples == [800.0] * 3 and told.prefill_tokens_per_s["24"].value == 240.0
    assert told.decode_tokens_per_s.samples == [30.0] * 3
    assert told.machine.runtime_build == "llama-bench, llama.cpp abc (7), CPU, sha256 0" and told.settings.threads == 2
    assert told.ttft_s["8"].value is None and told.ttft_s["8"].reason == "llama-bench reads no text"
    assert told.icl_p99_s.reason == "llama-bench writes no text" and told.load_s.value is None
    assert told.peak_rss_bytes.value > 0 and told.memory["decode"].anonymous_bytes.value > 0


@pytest.mark.parametrize("said", ["echo no", "echo '[{}]'", "echo '[]'", "echo 7"])
def test_what_is_no_result_of_llama_bench_is_one_sentence(job, said):
    with pytest.raises(EdgekdError, match=r"the runner's answer is not one|llama-bench measured less"):
        llama_bench(job(said))


def test_the_real_llama_bench(artifact, board, tmp_path):
    built = ROOT / "build" / "llama.cpp" / "bin" / "llama-bench"
    if not built.is_file():
        pytest.skip("not built: make llama-bench")
    code, out, err = edgekd(
        "bench", artifact.folder, "--device", "ssh:board", "--runner", built, *LENGTHS, *QUICK, "--json"
    )
    assert code == 0, err
    told = json.loads(out)
    assert told["prefill_tokens_per_s"]["24"]["value"] > 0 and len(told["decode_tokens_per_s"]["samples"]) == 2


def test_llama_main_tells_what_its_clock_counts(job, home):
    """Milliseconds by ``extension/llm/runner/stats.h``: loaded in 40, 24 tokens read in 12 and 5 written in 50."""
    observed = (
        'n=${text%% \\$*}; n=${n##* }; echo "PyTorchObserver {\\"prompt_tokens\\":$n,\\"generated_tokens\\":5,'
        '\\"model_load_start_ms\\":10,\\"model_load_end_ms\\":50,\\"inference_start_ms\\":60,\\"inference_end_ms\\":122,'
        '\\"prompt_eval_end_ms\\":72,\\"first_token_ms\\":73,\\"aggregate_sampling_time_ms\\":1,'
        '\\"SCALING_FACTOR_UNITS_PER_SECOND\\":1000}"'
    )
    log = home / "job" / "log"
    script = (
        f'for word; do case $word in --prompt=*) text=${{word#--prompt=}};; *) echo "$word" >>{log.name};; esac; done'
    )
    told = llama_main(job(f'cd "{log.parent}"; {script}; printf %s "$text" >text; {observed}'))
    assert told.load_s.value == 0.04 and told.ttft_s["24"].samples == [0.013] * 3
    assert told.prefill_tokens_per_s["24"].value == 2000.0 and told.decode_tokens_per_s.value == 100.0
    assert told.icl_p50_s.reason == "llama_main does not tell" and told.tokenize_s["8"].value is None
    assert (log.parent / "text").read_text() == "it's 24 $HOME\n\n"
    words = log.read_text().split()
    assert {"--seq_len=31", "--seq_len=10", "--cpu_threads=2", "--temperature=0", "--warmup=true"} <= set(words)
