"""Records hold what float64 arithmetic gives, the same after a resume, and cost what they say."""

from dataclasses import replace

import pyarrow.parquet
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import adamw, make_data, make_module, make_trainer, weights_of

from opd_lightning import NLL, OPDModule, SampledTokenObjective
from opd_lightning.backends.hf import HFStudent, HFTeacher
from opd_lightning.callbacks.token_recorder import TokenRecorder, estimated_bytes
from opd_lightning.callbacks.token_rows import TokenRows
from opd_lightning.interfaces import ScoreRequest, Tokenizer, TokenWeighting
from opd_lightning.objectives import ListedScores
from opd_lightning.reports.token_records import VALUES, find_records, read_header, read_record, steps_of, write_record
from opd_lightning.reports.token_view import token_view
from opd_lightning.teachers import PrivilegedTeacher


def fit(folder, folders, steps=5, ckpt_path=None, recorder=None, data=None, save=None, **options):
    recorder = recorder or TokenRecorder(every_n_steps=2, num_rollouts=3, num_fixed=2, top_k=4)
    module = make_module(*folders, **({"optimizer": adamw} | options))
    trainer = make_trainer(folder, steps, callbacks=[recorder])
    trainer.fit(module, data or make_data(rollouts_per_prompt=2), ckpt_path=ckpt_path)
    if save:
        trainer.save_checkpoint(save)
    return module, recorder


@pytest.fixture(scope="module")
def folders(tiny_qwen3_folder, tiny_teacher_folder):
    return tiny_qwen3_folder, tiny_teacher_folder


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    module, recorder = fit(folder, folders)
    return folder / "tokens", module, recorder


def log_probs(path, row):
    """Float64, of the model as it is on the disk, at every token of the answer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
    with torch.no_grad():
        return model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]


def test_steps_and_kinds(whole):
    folder, _, recorder = whole
    assert list(steps_of(folder)) == [0, 2, 4, 5] == recorder.recorded
    kinds = {step: [row["kind"] for row in read_record(path)] for step, path in steps_of(folder).items()}
    assert kinds == {0: ["own"] * 3 + ["fixed"] * 2} | dict.fromkeys((2, 4), ["own"] * 3 + ["fixed"] * 2) | {
        5: ["fixed"] * 2
    }


def test_values_are_those_of_float64(whole, folders):
    for row in read_record(whole[0] / "step=000000.parquet"):
        p, q = (log_probs(path, row) for path in folders)
        p, q = p.log_softmax(-1), q[:, : p.shape[-1]].log_softmax(-1)  # the teacher's head is padded
        ids = torch.tensor(row["token_ids"])[:, None]
        student, teacher = p.gather(-1, ids)[:, 0], q.gather(-1, ids)[:, 0]
        both = [set(a.tolist()) & set(b.tolist()) for a, b in zip(p.topk(16).indices, q.topk(16).indices, strict=True)]
        expected = {
            "student_log_prob": student,
            "teacher_log_prob": teacher,
            "sampled_log_ratio": student - teacher,
            "reverse_kl": (p.exp() * (p - q)).sum(-1),
            "forward_kl": (q.exp() * (q - p)).sum(-1),
            "student_entropy": -(p.exp() * p).sum(-1),
            "teacher_entropy": -(q.exp() * q).sum(-1),
            "overlap_ratio": torch.tensor([len(each) / 16 for each in both]),
            "overlap_mass_student": torch.stack([p[i, list(each)].exp().sum() for i, each in enumerate(both)]),
            "overlap_mass_teacher": torch.stack([q[i, list(each)].exp().sum() for i, each in enumerate(both)]),
        }
        for name, values in expected.items():
            assert row[name] == pytest.approx(values.tolist(), abs=2e-5), name
        assert row["advantage"] is None and row["token_weight"] is None
        for who, whole_list in (("student", p), ("teacher", q)):
            best = whole_list.topk(4)
            assert row[f"{who}_top_ids"] == best.indices.tolist()
            assert row[f"{who}_top_log_probs"][0] == pytest.approx(best.values[0].tolist(), abs=2e-5)


def test_a_row_says_what_was_asked_and_what_came_of_it(whole):
    folder, module, _ = whole
    first, second = (read_record(folder / f"step=00000{step}.parquet") for step in (0, 2))
    row = first[0]
    assert row["student_prompt"].startswith("<|im_start|>user\nsay ") and row["teacher_prompt"] == row["student_prompt"]
    assert "".join(row["texts"]).startswith(row["response"]) and row["num_tokens"] == len(row["token_ids"])
    assert row["reward"] in (0.0, 1.0) and row["reference"] in "abcdefghijkl" and row["source"] == "letters"
    assert row["truncated"] == (row["token_ids"][-1] not in module.spec.tokenizer.stop_ids)
    assert row["is_special"] == [text.startswith("<|") or "think>" in text for text in row["texts"]]
    assert row["staleness"] == 0 and all(row["student_wrote"])
    fixed = [[r["token_ids"] for r in rows if r["kind"] == "fixed"] for rows in (first, second)]
    own = [[r["token_ids"] for r in rows if r["kind"] == "own"] for rows in (first, second)]
    assert fixed[0] == fixed[1] == own[0][:2] and own[0] != own[1]
    assert first[3]["reverse_kl"] != second[3]["reverse_kl"]  # the student has learnt meanwhile
    header = read_header(folder)
    assert header["gives_vocabulary"] is True and header["facts_k"] == 16 and header["teacher"] == "HFTeacher"


def test_recording_changes_nothing(whole, folders, tmp_path):
    module = make_module(*folders, optimizer=adamw)
    make_trainer(tmp_path, 5).fit(module, make_data(rollouts_per_prompt=2))
    assert all(torch.equal(w, weights_of(whole[1])[n]) for n, w in weights_of(module).items())


def same_records(one, other):
    assert list(steps_of(one)) == list(steps_of(other))
    for step, path in steps_of(one).items():
        assert read_record(path) == read_record(steps_of(other)[step]), step


@pytest.mark.parametrize("stop", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_records_what_an_uninterrupted_one_does(whole, folders, tmp_path, stop):
    fit(tmp_path / "part", folders, stop, save=tmp_path / "x.ckpt")  # records its own last step too
    assert list(steps_of(tmp_path / "part" / "tokens"))[-1] == stop
    fit(tmp_path / "elsewhere", folders, ckpt_path=tmp_path / "x.ckpt")
    assert not (tmp_path / "elsewhere" / "tokens").exists()
    same_records(whole[0], tmp_path / "part" / "tokens")


class Killed(ModelCheckpoint):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.step == 0:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/early.ckpt")
        if batch.step == 2:
            raise RuntimeError("the machine is gone")


def test_steps_that_are_done_again_are_not_recorded_twice(whole, folders, tmp_path):
    recorder = TokenRecorder(every_n_steps=2, num_rollouts=3, num_fixed=2, top_k=4)
    trainer = make_trainer(tmp_path, 5, callbacks=[recorder, Killed(save_top_k=0)], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match=r"machine is gone"):
        trainer.fit(make_module(*folders, optimizer=adamw), make_data(rollouts_per_prompt=2))
    (tmp_path / "tokens" / "step=000004.parquet").write_bytes(b"of another continuation")
    (tmp_path / "tokens" / "step=000006.parquet.part").write_bytes(b"half")
    fit(tmp_path, folders, ckpt_path=tmp_path / "early.ckpt")
    same_records(whole[0], tmp_path / "tokens")


class Later(TokenWeighting):
    reads = ("reverse_kl",)

    def __call__(self, facts, micro_batch):
        return facts["reverse_kl"] + micro_batch.tokens.positions


def test_weight_and_advantage_are_those_of_the_training(folders, tmp_path):
    objective = SampledTokenObjective(advantage_clip=0.5)
    fit(tmp_path, folders, 1, objective=objective, token_weighting=Later())
    own, fixed = (
        [row for row in read_record(tmp_path / "tokens" / "step=000000.parquet") if row["kind"] == kind]
        for kind in ("own", "fixed")
    )
    for row in own:
        assert row["advantage"] == pytest.approx([min(0.5, max(-0.5, -x)) for x in row["sampled_log_ratio"]], abs=1e-6)
        assert row["token_weight"] == pytest.approx([x + i for i, x in enumerate(row["reverse_kl"])], abs=1e-5)
    assert all(row["advantage"] is None and row["token_weight"] is None for row in fixed)


class ListingTeacher(HFTeacher):
    """What a server gives: the sampled token and the likeliest few."""

    offer = ScoreRequest(top_k=6)

    def score(self, batch, request):
        scores = super().score(batch, request)
        return ListedScores(batch.tokens.ids, scores.sampled(), *scores.topk(request.top_k))


def test_a_teacher_that_gives_lists_leaves_the_rest_null(folders, tmp_path):
    teacher = ListingTeacher(str(folders[1]), dtype="float32")
    fit(tmp_path, folders, 1, teacher_object=teacher, objective=SampledTokenObjective(), top_k_metrics=6)
    row = read_record(tmp_path / "tokens" / "step=000000.parquet")[0]
    unknown = {name for name in VALUES if row[name] is None}
    assert unknown == {"reverse_kl", "forward_kl", "teacher_entropy", "token_weight"}
    assert len(row["teacher_top_ids"][0]) == 4 and read_header(tmp_path)["gives_vocabulary"] is False


class Told(PrivilegedTeacher):
    """Is shown something that only a step's groups can give."""

    def check_problems(self, problems):
        pass

    def shape(self, groups):
        return [[replace(each, context={"hint": f"one of {len(group)}"}) for each in group] for group in groups]


def test_fixed_answers_are_read_with_what_the_teacher_was_shown(folders, tmp_path):
    teacher = Told(HFTeacher(str(folders[1]), dtype="float32"), "{hint} {question}", missing="plain")
    _, recorder = fit(tmp_path, folders, 1, teacher_object=teacher)
    rows = read_record(tmp_path / "tokens" / "step=000000.parquet")
    own = {tuple(row["token_ids"]): row["teacher_log_prob"] for row in rows if row["kind"] == "own"}
    fixed = [row for row in rows if row["kind"] == "fixed"]
    assert [own[tuple(row["token_ids"])] for row in fixed] == [pytest.approx(row["teacher_log_prob"]) for row in fixed]
    again = TokenRecorder()
    again.load_state_dict(recorder.state_dict())
    assert [record["context"] for record in again.state_dict()["fixed"]] == [{"hint": "one of 2"}] * 2


def test_without_a_teacher_there_is_the_student(tiny_qwen3_folder, tmp_path):
    module = OPDModule(HFStudent(str(tiny_qwen3_folder)), None, NLL(), optimizer=adamw)
    make_trainer(tmp_path, 1, callbacks=[TokenRecorder(top_k=4)]).fit(module, make_data(rollouts_per_prompt=2))
    row = read_record(tmp_path / "tokens" / "step=000000.parquet")[0]
    assert {name for name in VALUES if row[name] is not None} == {"student_log_prob", "student_entropy"}
    assert row["teacher_top_ids"] is row["teacher_prompt"] is None and len(row["student_top_ids"][0]) == 4
    fragment = token_view([tmp_path])
    assert "There was no teacher" in fragment and fragment.count("no divergence was recorded") == 2


def test_tokens_of_others_are_null(whole, folders, tmp_path):
    _, module, recorder = whole
    rollout = replace(module.last_rollouts[0], response_ids=torch.tensor([9, 10, 11]), log_probs=torch.zeros(3))
    rollout = replace(rollout, student_wrote=torch.tensor([True, False, True]))
    module.load_teacher()
    (found,) = recorder._inspect(module, [rollout], is_trained=True)
    (row,) = TokenRows(module.spec.tokenizer, None).rows([found], 7, "own", None)
    assert row["student_wrote"] == [True, False, True]
    assert row["reverse_kl"][1] is row["student_top_ids"][1] is None and row["reverse_kl"][2] >= 0
    write_record(tmp_path, 7, [row], {})
    assert read_record(tmp_path / "step=000007.parquet")[0]["reverse_kl"][1] is None


class Pieces(Tokenizer):
    """Drops the space before the first word, as sentencepiece does; one token is half a character."""

    pieces = ["", " the", "<s>", "\ud83d"]

    def render(self, messages):
        raise ValueError("no template")

    def encode(self, text):
        return []

    def decode(self, token_ids, *, skip_special_tokens=True):
        shown = (self.pieces[i] for i in token_ids if not (skip_special_tokens and i == 2))
        return "".join(shown).removeprefix(" ")


def test_tokens_keep_their_spaces_and_half_characters_are_spelt_out(whole, tmp_path):
    rows = TokenRows(Pieces(), None)
    assert [rows._text(i) for i in (1, 2, 3)] == [(" the", False), ("<s>", True), ("\ud83d", False)]
    row = read_record(whole[0] / "step=000000.parquet")[0] | {"response": "\ud83d", "texts": ["\ud83d"]}
    write_record(tmp_path, 1, [row], {})
    assert read_record(tmp_path / "step=000001.parquet")[0]["texts"] == ["\\ud83d"]


def test_others_can_read_it_and_it_is_as_small_as_said(whole):
    path = whole[0] / "step=000000.parquet"
    table = pyarrow.parquet.read_table(path)
    assert str(table["reverse_kl"].type) == "list<element: float>"
    assert str(table["student_top_ids"].type) == "list<element: list<element: int32>>"
    num_prompt_tokens = sum(map(len, table["prompt_ids"].to_pylist()))
    said = estimated_bytes(sum(table["num_tokens"].to_pylist()), 4, num_prompt_tokens)
    assert 0.5 * said < path.stat().st_size < said  # few different words


def test_the_number_of_records_is_bounded_but_for_the_last(folders, tmp_path):
    recorder = TokenRecorder(every_n_steps=1, num_rollouts=0, num_fixed=1, max_records=2)
    with pytest.warns(UserWarning, match=r"max_records: 2 steps are recorded; from here on only the last one is"):
        fit(tmp_path, folders, 4, recorder=recorder)
    assert list(steps_of(tmp_path / "tokens")) == [0, 1, 4]


def test_mistakes_are_named(whole, folders, tmp_path):
    with pytest.raises(ValueError, match=r"every_n_steps.*got 0"):
        TokenRecorder(every_n_steps=0)
    with pytest.raises(ValueError, match=r"num_rollouts: expected at least 1 .* got 0 of both"):
        TokenRecorder(num_rollouts=0, num_fixed=0)
    with pytest.raises(ValueError, match=r"dirpath: .* holds records already, and those of two runs"):
        fit(tmp_path, folders, 1, recorder=TokenRecorder(dirpath=str(whole[0])))
    with pytest.raises(ValueError, match=r"records: .* holds no records of tokens .* Add the callback TokenRecorder"):
        find_records(tmp_path)
    (tmp_path / "step=000001.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"step=000001.parquet' cannot be read"):
        read_header(tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "step=000001.parquet")
    with pytest.raises(ValueError, match=r"is no record of tokens"):
        read_header(tmp_path)
