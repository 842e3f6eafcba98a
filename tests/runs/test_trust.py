"""A teacher whose tokenizer is code of its own: what the spec says of trust counts in every stage."""

import json
import shutil

import pytest
import yaml
from test_cli import edgekd, refused

from edgekd.errors import EdgekdError
from edgekd.runs.preflight import open_run
from edgekd.spec import Spec

pytest.importorskip("llama_cpp")

SPEC = """
name: tiny
teacher: {{model: teacher, trust_remote_code: {trusted}}}
student: {student}
data: {{source: text, paths: [text/*.txt], context: 32, validation_share: 0.2, test_share: 0.2}}
distill: {{steps: 2, batch_size: 2, warmup_steps: 1, validate_every: 2}}
quantize: {{method: qad, calibration_windows: 2, qad: {{steps: 2, batch_size: 2, warmup_steps: 1, validate_every: 2}}}}
targets: [{{target: gguf, recipes: [portable-int4]}}]
verify: {{windows: 1, context: 32, greedy_tokens: 2, thresholds: {{}}}}
bench: {{prompt_tokens: [8], decode_tokens: 2, runs: 1, cold_runs: 0, curve_seconds: 0}}
"""
CODE = """
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

class Words(PreTrainedTokenizerFast):
    vocab_files_names = {"words": "words.json"}

    def __init__(self, words=None, added_tokens_decoder=None, **kwargs):
        super().__init__(tokenizer_object=Tokenizer.from_file(words), **kwargs)
"""


@pytest.fixture
def project(tmp_path, tiny_teacher, monkeypatch):
    """A teacher whose tokenizer.json has an id too many unless its code reads it, and a student that has not."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    shutil.copytree(tiny_teacher, tmp_path / "student")
    words = json.loads((teacher / "tokenizer.json").read_text())
    (teacher / "words.json").write_text(json.dumps(words))
    words["added_tokens"].append(words["added_tokens"][0] | {"id": 320, "content": "<|too_many|>"})
    (teacher / "tokenizer.json").write_text(json.dumps(words))
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": [None, "words.Words"]}}
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    (teacher / "words.py").write_text(CODE)
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    return tmp_path


def test_a_further_teachers_trust_counts_too(project):
    further = {"model": "teacher", "trust_remote_code": True}
    spec = yaml.safe_load(SPEC.format(trusted="false", student="{init: cut, layers: 2}"))
    spec |= {"teacher": {"model": "student", "more": [further]}}
    assert len(open_run(Spec.model_validate(spec), base=project, out=project / "run").teachers) == 2
    further["trust_remote_code"] = False
    with pytest.raises(EdgekdError, match=r"the tokenizer has 321 ids, the embedding 320 rows"):
        open_run(Spec.model_validate(spec), base=project, out=project / "run")


@pytest.mark.parametrize("student", ["{init: cut, layers: 2}", "{init: checkpoint, model: student}"])
def test_trust_reaches_every_stage(project, student):
    (project / "spec.yaml").write_text(SPEC.format(trusted="true", student=student))
    done = edgekd("run", "spec.yaml", "--report-only", "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quality"]["student"]["kl_to_teacher"] > 0


def test_without_trust_nothing_runs(project):
    (project / "spec.yaml").write_text(SPEC.format(trusted="false", student="{init: cut, layers: 2}"))
    refused(edgekd("run", "spec.yaml", cwd=project), "the tokenizer has 321 ids, the embedding 320 rows")
    assert not (project / "runs").exists()
