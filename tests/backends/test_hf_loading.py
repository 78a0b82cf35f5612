"""Bad model folders and bad pairs: one clear line each, before any weights are read where possible."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings

import pytest
from conftest import CHARACTERS, END_OF_TEXT, END_OF_TURN, VOCAB_SIZE, make_model, make_tokenizer, save_folder
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from opd_lightning.backends.hf import HFStudent, HFTeacher, LoraSettings, check_compatibility
from opd_lightning.backends.hf.loading import ModelSource, most_tokens
from opd_lightning.interfaces import Student, Tokenizer


@pytest.fixture
def copy(tmp_path, tiny_qwen3_folder):
    """A copy of the student's folder to spoil."""
    return shutil.copytree(tiny_qwen3_folder, tmp_path / "model")


def cut(file, share=0.5):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def remove_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def only_adapter(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")


SPOILED = {
    "no config": (lambda f: (f / "config.json").unlink(), r"student\.path: no config\.json in .*found: .*Hugging Face"),
    "config cut": (lambda f: cut(f / "config.json"), r"student\.path: cannot load the configuration .* valid JSON"),
    "unknown type": (
        lambda f: (f / "config.json").write_text('{"model_type": "bar"}'),
        r"student\.path: cannot load the configuration .*`bar`",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"student\.path: cannot load the weights .*no file"),
    "weights cut": (lambda f: cut(f / "model.safetensors"), r"student\.path: a weight file .* damaged or cut short"),
    "weights empty": (lambda f: cut(f / "model.safetensors", 0), r"student\.path: a weight file .* damaged or cut"),
    "weight missing": (
        lambda f: edit_weights(f, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight")),
        r"student\.path: 1 weights are missing .* 'model\.layers\.1\.mlp\.up_proj\.weight'.*incomplete",
    ),
    "wrong shape": (
        lambda f: edit_weights(
            f, lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"][:5]})
        ),
        r"student\.path: 1 weights in .* first 'model\.norm\.weight': expected \[32\], found \[5\]",
    ),
    "NaN": (
        lambda f: edit_weights(f, lambda weights: weights["model.norm.weight"].fill_(float("nan"))),
        r"student\.path: the logits of Qwen3ForCausalLM are NaN: its weights are damaged",
    ),
    "no tokenizer": (remove_tokenizer, r"student\.path: no tokenizer in .*Expected tokenizer\.json"),
    "tokenizer cut": (lambda f: cut(f / "tokenizer.json"), r"student\.path: a JSON file in .* damaged or cut short"),
    "only an adapter": (only_adapter, r"student\.path: .* holds only a LoRA adapter.*student\.adapter_path"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_folder_is_explained_in_one_line(copy, case):
    spoil, message = SPOILED[case]
    spoil(copy)
    with pytest.raises(ValueError, match=message) as caught:
        HFStudent(str(copy)).load()
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value) or case == "NaN"


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "some/where/model", "sp ace", "~/nowhere/model"])
def test_a_path_that_is_nothing_says_what_was_expected(path):
    with pytest.raises(ValueError, match=r"student\.path: no folder .*config\.json, \*\.safetensors .* hub id such as"):
        _ = HFStudent(path).tokenizer


def test_a_file_is_no_folder(copy):
    with pytest.raises(ValueError, match=r"student\.path: no folder '.*model\.safetensors'"):
        HFStudent(str(copy / "model.safetensors")).load()


def test_a_hub_id_without_network_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"teacher\.path: cannot load the configuration of 'nobody/nothing'.*hub id: check"
    ):
        HFTeacher("nobody/nothing").preflight(HFStudent("nobody/nothing"))


def test_unknown_attention_implementation_is_refused(tiny_qwen3_folder):
    with pytest.raises(
        ValueError, match=r"student\.path: cannot load the weights with student\.attn_implementation='quick' of"
    ):
        HFStudent(str(tiny_qwen3_folder), attn_implementation="quick").load()


def test_quantization_without_its_package_is_explained(tiny_teacher_folder, tiny_qwen3_folder):
    teacher = HFTeacher(str(tiny_teacher_folder), quantization_config={"quant_method": "quanto", "weights": "int8"})
    with pytest.raises(
        ValueError, match=r"teacher\.path: cannot load the weights with teacher\.quantization_config=.*quanto"
    ):
        teacher.setup(HFStudent(str(tiny_qwen3_folder)), None, None)


def test_what_transformers_reads_beside_the_named_settings_of_a_method_is_not_refused():
    """Every class of settings swallows unknown names; these look at them."""
    for name, settings in AUTO_QUANTIZATION_CONFIG_MAPPING.items():
        reads = (
            "kwargs." in (code := inspect.getsource(settings.__init__)) or "kwargs[" in code or "dict(kwargs)" in code
        )
        if reads and not name.startswith(("bitsandbytes", "nvfp4")):  # these look to tell what they do not know
            HFTeacher("teacher", quantization_config={"quant_method": name, "a setting of its own": 1})
    HFTeacher("teacher", quantization_config={"quant_method": "awq", "bits": 4, "version": "gemm"})


def test_rotary_factors_that_change_with_the_length_of_a_batch_end_the_context(tmp_path, tiny_qwen3_folder):
    """Beside a longer rollout, a short one would be read with other factors: by nats, and not as it was written."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    folder = str(save_folder(tmp_path, model, make_tokenizer()))
    assert model.config.max_position_embeddings == 128
    assert HFStudent(folder).context_length == 32
    with pytest.raises(ValueError, match=r"student\.max_context_length: .* takes at most 32 tokens, got 64"):
        HFStudent(folder, max_context_length=64).context_length  # noqa: B018
    with pytest.warns(UserWarning, match=r"context of 32 tokens is shorter .* Set student\.max_context_length: 32"):
        assert (
            check_compatibility(HFStudent(str(tiny_qwen3_folder)), ModelSource(folder, "teacher")).context_length == 32
        )
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    assert most_tokens(make_model(rope_parameters=yarn).config) == 128  # the same factors whatever the length


def test_a_tokenizer_with_more_ids_than_rows_is_refused_before_the_weights(tmp_path):
    folder = save_folder(tmp_path, make_model(vocab_size=VOCAB_SIZE - 1), make_tokenizer())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"ids up to {VOCAB_SIZE - 1}, but the model has only {VOCAB_SIZE - 1} rows"):
        HFStudent(str(folder)).load()


def test_sandbox_names_stand_for_folders_of_the_package():
    assert ModelSource("sandbox:student", "student").is_folder
    with pytest.raises(ValueError, match=r"expected sandbox:student, .* or sandbox:long-teacher, got 'sandbox:cat'"):
        HFStudent("sandbox:cat").load()


# ---------------------------------------------------------------------------------------------------------- the pair


def make_pair(tmp_path, student_tokenizer=None, teacher_tokenizer=None, **teacher):
    """Folders of a student and a teacher; the teacher's weights are taken away, since nothing here may read them."""
    rows = {"vocab_size": teacher.pop("rows", VOCAB_SIZE + 30)}
    student = save_folder(tmp_path / "student", make_model(), student_tokenizer or make_tokenizer())
    tokenizer = teacher_tokenizer or make_tokenizer()
    folder = save_folder(tmp_path / "teacher", make_model(seed=2, **rows), tokenizer, teacher.pop("eos", None))
    (folder / "model.safetensors").unlink()
    return HFStudent(str(student), **teacher), HFTeacher(str(folder))


def test_a_fitting_pair_passes_without_weights_or_warnings(tmp_path):
    student, teacher = make_pair(tmp_path, template_kwargs={"enable_thinking": False}, lora=LoraSettings(r=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.preflight(student)
        found = check_compatibility(student, teacher.source)
    assert (found.vocab_size, found.context_length) == (VOCAB_SIZE, 128)


def test_different_vocabularies_are_named(tmp_path):
    swapped = CHARACTERS.replace("ab", "ba")
    student, teacher = make_pair(tmp_path, teacher_tokenizer=make_tokenizer(swapped))
    message = (
        r"teacher\.path: the tokenizers of .* differ in 2 tokens: 'a' is id 9 for the student and id 10 for the"
        r" teacher; 'b' is id 10 for the student and id 9 for the teacher\..*same family"
    )
    with pytest.raises(ValueError, match=message):
        teacher.preflight(student)


def test_a_token_that_only_one_of_them_has_is_named(tmp_path):
    student, teacher = make_pair(tmp_path, teacher_tokenizer=make_tokenizer(CHARACTERS + "~"))
    with pytest.raises(ValueError, match=r"1 tokens: '~' is no token for the student and id 81 for the teacher"):
        teacher.preflight(student)


def test_a_teacher_with_too_few_rows_is_refused(tmp_path):
    student, teacher = make_pair(tmp_path, rows=VOCAB_SIZE - 2)
    with pytest.raises(ValueError, match=rf"teacher\.path: the tokenizer has ids up to .* only {VOCAB_SIZE - 2} rows"):
        teacher.preflight(student)


def test_a_teacher_that_ends_otherwise_needs_an_extra_stop_token(tmp_path):
    options = {"eos_token": "<|endoftext|>"}
    student_folder = save_folder(tmp_path / "base", make_model(), make_tokenizer(**options), eos_token_id=END_OF_TEXT)
    _, teacher = make_pair(tmp_path, eos=[END_OF_TURN, END_OF_TEXT])
    with pytest.raises(
        ValueError, match=r"run on to the length limit\. Set student\.extra_stop_tokens: \['<\|im_end\|>'\]"
    ):
        teacher.preflight(HFStudent(str(student_folder)))
    teacher.preflight(HFStudent(str(student_folder), extra_stop_tokens=["<|im_end|>"]))


def test_a_student_that_also_ends_otherwise_is_fine(tmp_path):
    student, teacher = make_pair(tmp_path, eos=END_OF_TURN, extra_stop_tokens=["!"])
    teacher.preflight(student)
    assert len(student.tokenizer.stop_ids) == 3


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"])
def test_different_chat_templates_are_warned_about(tmp_path, template):
    student, teacher = make_pair(tmp_path, teacher_tokenizer=make_tokenizer(chat_template=template))
    with pytest.warns(UserWarning, match=r"teacher\.path: the chat templates of student and teacher differ"):
        teacher.preflight(student)


def test_a_teacher_without_template_uses_the_students(tmp_path):
    student, teacher = make_pair(tmp_path, teacher_tokenizer=make_tokenizer(chat_template=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.preflight(student)


def test_a_student_without_template_may_have_raw_prompts(tmp_path):
    student, teacher = make_pair(tmp_path, student_tokenizer=make_tokenizer(chat_template=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.preflight(student)


def test_a_teacher_that_ends_its_answers_is_said_to_a_student_that_cannot(tmp_path):
    tokenizer = make_tokenizer(eos_token=None)
    student = HFStudent(str(save_folder(tmp_path / "own", make_model(eos_token_id=None), tokenizer, eos_token_id=[])))
    assert student.tokenizer.stop_ids == ()
    _, teacher = make_pair(tmp_path)
    with pytest.warns(
        UserWarning, match=rf"sampling\.stop_ids: .* none\. Unless you gave \[{END_OF_TEXT}, {END_OF_TURN}\]"
    ):
        teacher.preflight(student)


class LettersTokenizer(Tokenizer):
    """No transformers in it."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary)
        self.pad_id = 0
        self.stop_ids = (END_OF_TEXT, END_OF_TURN)

    def render(self, messages):
        return self.encode(messages[0]["content"])

    def encode(self, text):
        return [self.vocabulary[letter] for letter in text]

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(list(self.vocabulary)[i] for i in token_ids)


class PlainStudent(Student):
    """A student that is no `HFStudent`."""

    context_length = 128
    load = hidden_states = head = save = describe = None

    def __init__(self, vocabulary):
        self.own_tokenizer = LettersTokenizer(vocabulary)

    @property
    def tokenizer(self):
        return self.own_tokenizer


def test_any_student_may_have_a_hugging_face_teacher(tiny_teacher_folder):
    teacher = HFTeacher(str(tiny_teacher_folder))
    vocabulary = HFStudent(str(tiny_teacher_folder)).tokenizer.vocabulary
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    with pytest.warns(UserWarning, match="the chat templates of student and teacher differ"):
        teacher.preflight(PlainStudent(ordered))
    assert teacher.context_length == 128
    with pytest.raises(ValueError, match=r"tokenizers of the student and of .* differ in 1 tokens: '~' is id 81"):
        teacher.preflight(PlainStudent(ordered | {"~": 81}))


def test_eos_of_the_generation_config_may_be_one_id_or_missing(copy):
    for content, expected in (
        ({"eos_token_id": END_OF_TEXT}, (END_OF_TEXT, END_OF_TURN)),
        ({"eos_token_id": [END_OF_TEXT]}, (END_OF_TEXT, END_OF_TURN)),
        ({}, (END_OF_TURN,)),
    ):
        (copy / "generation_config.json").write_text(json.dumps(content))
        assert HFStudent(str(copy)).tokenizer.stop_ids == expected
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": [END_OF_TURN, END_OF_TEXT]}))
    assert HFStudent(str(copy)).tokenizer.stop_ids == (END_OF_TEXT, END_OF_TURN)
