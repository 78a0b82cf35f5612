"""A close look gives the training's facts, however it is cut, and asks a teacher for what it offers."""

import pytest
import torch
from toys import make_data, make_module, make_trainer

from opd_lightning import DivergenceObjective, SampledTokenObjective
from opd_lightning.backends.hf import HFTeacher
from opd_lightning.interfaces import ScoreRequest
from opd_lightning.rollouts.inspection import Look, all_offered, inspect_rollouts


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_qwen3_folder, tiny_teacher_folder):
    module = make_module(tiny_qwen3_folder, tiny_teacher_folder)
    make_trainer(tmp_path_factory.mktemp("run"), 1).fit(module, make_data())
    module.load_teacher()
    return module


def look(module, objective=None, **changes):
    settings = {"asked": all_offered(module.teacher, None, 3), "facts_k": 16, "num_listed": 3, "weighting": None}
    batches = module.make_micro_batches(module.last_rollouts)
    return inspect_rollouts(
        module.spec, module.model, batches, module.teacher, Look(objective or module.objective, **(settings | changes))
    )


def test_facts_are_those_of_the_training_step(trained):
    batches = trained.make_micro_batches(trained.last_rollouts)
    with torch.no_grad():
        compared = list(trained.compare(batches, trained.objective, trained.score_request, facts_k=16))
    for one, other in zip(look(trained), (each for part in compared for each in part.by_rollout()), strict=True):
        assert one.rollout is other.rollout
        for name, values in other.facts.items():
            torch.testing.assert_close(one.values[name], values, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


def test_chunks_change_nothing(trained):
    for whole, cut in zip(look(trained), look(trained, DivergenceObjective(chunk_tokens=3)), strict=True):
        assert torch.equal(whole.student.ids, cut.student.ids) and torch.equal(whole.teacher.ids, cut.teacher.ids)
        for name, values in whole.values.items():
            torch.testing.assert_close(cut.values[name], values, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name)


def test_advantages_are_there_when_they_are_asked_for(trained):
    objective = SampledTokenObjective()
    (first, *_), (second, *_) = look(trained, objective), look(trained, objective, with_advantages=False)
    torch.testing.assert_close(first.values["advantage"], -first.values["sampled_log_ratio"])
    assert "advantage" not in second.values and "advantage" not in look(trained)[0].values


def test_a_list_that_the_training_asks_for_is_asked_for_again_as_it_is(trained):
    class Server(HFTeacher):
        offer = ScoreRequest(top_k=20)

    server = Server("nowhere")
    needed = ScoreRequest(top_k=16, temperature=2.0)
    assert all_offered(server, needed, 8) == needed  # the same question, which may have been answered early
    assert all_offered(server, ScoreRequest(), 8) == ScoreRequest(top_k=8)
    assert all_offered(server, None, 99) == ScoreRequest(top_k=20)
    assert all_offered(trained.teacher, None, 8).full_vocabulary
