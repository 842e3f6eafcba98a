"""The artifact: valid only with a whole manifest, whole files, and no path that leaves the folder."""

import json
import os

import pytest

from edgekd.errors import BadArtifact
from edgekd.files import digest
from edgekd.manifest import MANIFEST, Contract, add_proof, load_artifact, write_artifact
from edgekd.proof import Audit, Benchmark, Parity


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "more.txt").write_text("more")
    contract = Contract(context_length=8, vocab_size=4, bos_id=None, eos_ids=[0], add_bos=False, chat_template=None)
    write_artifact(
        tmp_path,
        name="n",
        target="t",
        recipe="r",
        runtime="x",
        main_file="model.bin",
        student_digest="d",
        parameters=7,
        bits_per_weight=8.0,
        contract=contract,
        versions={},
    )
    return tmp_path


def test_round_trip(folder):
    artifact = load_artifact(folder)
    assert artifact.main_file == folder / "model.bin"
    assert artifact.size_bytes == len(b"weights") + len("more")
    assert set(artifact.manifest.files) == {"model.bin", "sub/more.txt"}


def test_proofs_are_added_one_by_one(folder):
    parity = Parity(windows=1, window_tokens=8, unusable_positions=0, kl_mean=0.5)
    add_proof(add_proof(load_artifact(folder), parity=parity), benchmark=Benchmark())
    manifest = load_artifact(folder).manifest
    assert manifest.parity == parity and manifest.parity.kl_mean == 0.5
    assert manifest.benchmark == Benchmark() and manifest.benchmark.load_s.value is None
    assert manifest.audit is None
    seen = Audit(
        status="failed",
        failures=["read: /x"],
        not_checked=[],
        opened={"other": 1},
        opened_outside=["/x"],
        written=[],
        sockets=[],
    )
    again = load_artifact(add_proof(load_artifact(folder), audit=seen).folder).manifest
    assert (again.audit, again.parity) == (seen, parity)


def test_a_proof_follows_no_link(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "it"
    outside.write_text("mine")
    for name in ("manifest.json.partial", ".manifest.json.partial", "manifest.json.tmp"):
        (folder / name).symlink_to(outside)
    add_proof(load_artifact(folder), benchmark=Benchmark())
    assert outside.read_text() == "mine"


def test_no_manifest(tmp_path):
    with pytest.raises(BadArtifact, match=r"has no manifest.json"):
        load_artifact(tmp_path)


def test_half_a_manifest(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(BadArtifact, match=r"manifest\.json"):
        load_artifact(folder)


def test_a_changed_file(folder):
    (folder / "model.bin").write_bytes(b"Weights")
    with pytest.raises(BadArtifact, match=r"model.bin is not the file its manifest names"):
        load_artifact(folder)


def test_a_missing_file(folder):
    (folder / "sub" / "more.txt").unlink()
    with pytest.raises(BadArtifact, match=r"more.txt is missing"):
        load_artifact(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../outside"])
def test_paths_stay_inside(folder, name):
    _edit(folder, lambda m: m["files"].update({name: "0" * 64}))
    with pytest.raises(BadArtifact, match=r"leaves the folder"):
        load_artifact(folder)


def test_a_link_to_the_outside(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret"
    outside.write_text("secret")
    (folder / "link").symlink_to(outside)
    _edit(folder, lambda m: m["files"].update({"link": "0" * 64}))
    with pytest.raises(BadArtifact, match=r"leaves the folder"):
        load_artifact(folder)


def test_the_main_file_is_checked_too(folder):
    _edit(folder, lambda m: m.update(main_file=MANIFEST))
    with pytest.raises(BadArtifact, match=r"main_file"):
        load_artifact(folder)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "", ".", "loop", "sub", "pipe"])
def test_names_that_are_no_files(folder, name):
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    _edit(folder, lambda m: m["files"].update({name: "0" * 64}))
    with pytest.raises(BadArtifact):
        load_artifact(folder)


@pytest.mark.parametrize("what", ["manifest.json", "model.bin", "sub"])
def test_links_that_lead_out_are_refused(folder, tmp_path_factory, what):
    outside = tmp_path_factory.mktemp("outside") / "it"
    (folder / what).rename(outside)
    (folder / what).symlink_to(outside)
    with pytest.raises(BadArtifact, match="leaves the folder"):
        load_artifact(folder)


def test_only_listed_files_have_a_path(folder):
    (folder / "unlisted").write_text("x")
    artifact = load_artifact(folder)
    assert artifact.path("sub/more.txt").read_text() == "more"
    with pytest.raises(BadArtifact, match="does not list 'unlisted'"):
        artifact.path("unlisted")
    with pytest.raises(BadArtifact, match="does not list 'unlisted'"):
        artifact.check_nothing_else()
    artifact.check_nothing_else("sub")
    (folder / "sub" / "more").symlink_to(folder)
    with pytest.raises(BadArtifact, match="does not list 'sub/more'"):
        artifact.check_nothing_else("sub")


@pytest.mark.parametrize(
    "change",
    [
        {"contract": {"context_length": 0}},
        {"contract": {"context_length": -1}},
        {"contract": {"context_length": 2**31}},
        {"contract": {"context_length": 2**32}},
        {"contract": {"context_length": 8.5}},
        {"contract": {"context_length": "8"}},
        {"contract": {"context_length": True}},
        {"contract": {"context_length": float("nan")}},
        {"contract": {"vocab_size": 0}},
        {"contract": {"vocab_size": 2**63}},
        {"contract": {"eos_ids": [4]}},
        {"contract": {"eos_ids": [-1]}},
        {"contract": {"eos_ids": [0] * 10**5}},
        {"contract": {"bos_id": 4}},
        {"contract": {"bos_id": -1}},
        {"contract": {"normalizer": "NFKD"}},
        {"contract": {"add_bos": 1}},
        {"contract": []},
        {"parameters": -1},
        {"parameters": 2**70},
        {"bits_per_weight": 0},
        {"bits_per_weight": float("inf")},
        {"bits_per_weight": float("nan")},
        {"bits_per_weight": -4.0},
        {"files": []},
        {"files": {"model.bin": 7}},
        {"details": []},
        {"parity": {"kl_mean": 0.5}},
        {"parity": {"windows": 1, "window_tokens": 8, "unusable_positions": 0, "kl_mean": "0.5"}},
        {"parity": {"windows": 1, "window_tokens": 8, "unusable_positions": 0, "kl_mean": float("nan")}},
        {"benchmark": {"load_s": {"value": 1.0, "samples": []}}},
        {"benchmark": {"load_s": {"value": 1.0, "source": "a stopwatch", "samples": []}}},
        {"benchmark": []},
        {"unknown": 1},
        {"schema_version": 2},
        {"main_file": None},
    ],
)
def test_numbers_have_bounds_and_keys_a_type(folder, change):
    def edit(manifest):
        for key, value in change.items():
            inner = isinstance(value, dict) and key == "contract"
            manifest[key] = manifest[key] | value if inner else value

    _edit(folder, edit)
    with pytest.raises(BadArtifact, match=r"manifest\.json"):
        load_artifact(folder)


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def _edit(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
