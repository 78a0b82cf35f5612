"""`EffOPDOptimizer`: the wrapped optimiser in every respect, and a search now and then."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from opd_lightning import EffOPDOptimizer


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 1))


X = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
Y = X.sum(1, keepdim=True).tanh()


def loss_of(model):
    return nn.functional.mse_loss(model(X), Y)


def make_optimizer(model, rate=1e-3, **options):
    inner = torch.optim.AdamW(model.parameters(), lr=rate)
    settings = {"score": lambda: -loss_of(model), "module": model}
    return EffOPDOptimizer(inner, **(settings | options))


def train(model, optimizer, steps, scheduler=None, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights_of(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_a_rejected_search_leaves_the_wrapped_optimiser_alone():
    plain, wrapped = make_model(), make_model()
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), 10)
    optimizer = make_optimizer(wrapped, score=lambda: float("nan"))
    train(wrapped, optimizer, 10)
    assert torch.equal(weights_of(plain), weights_of(wrapped))
    assert optimizer.summary().startswith("EffOPD: 4 searches, 0 accepted")


def test_a_score_that_never_changes_moves_nothing():
    plain, wrapped = make_model(), make_model()
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), 10)
    optimizer = make_optimizer(wrapped, score=lambda: 0.0, backward=(-0.5,))
    train(wrapped, optimizer, 10)
    assert torch.equal(weights_of(plain), weights_of(wrapped))
    assert optimizer.last_search.tied
    assert optimizer.summary().startswith("EffOPD: 4 searches, 0 accepted, 4 tied, ")


def test_it_trains_faster_at_a_small_rate():
    plain, wrapped = make_model(), make_model()
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4), 40)
    optimizer = make_optimizer(wrapped, rate=1e-4)
    train(wrapped, optimizer, 40)
    assert optimizer.last_search.step == 32
    assert loss_of(wrapped.eval()) < 0.8 * loss_of(plain.eval())
    assert wrapped.training is False


def test_scoring_is_in_eval_mode_without_gradients_and_from_a_fixed_random_state():
    model, seen = make_model(), []

    def score():
        seen.append((model.training, torch.is_grad_enabled(), float(torch.rand(()))))
        return 0.0

    optimizer = make_optimizer(model, score=score, schedule=2, candidates=(1, 2))
    train(model, optimizer, 2)
    drawn = seen[0][2]
    assert seen == [(False, False, drawn)] * 3
    assert model.training
    # without the module, modes are the caller's business
    optimizer = make_optimizer(model, score=score, schedule=2, module=None)
    train(model, optimizer, 2)
    assert seen[-1][0] is True


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_resumed_run_is_the_uninterrupted_one(stop, tmp_path):
    def make(model):
        optimizer = make_optimizer(model)
        return optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    whole = make_model()
    optimizer, scheduler = make(whole)
    train(whole, optimizer, 12, scheduler)

    first = make_model()
    optimizer, scheduler = make(first)
    train(first, optimizer, stop, scheduler)
    state = {"model": first.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)

    resumed = make_model()
    optimizer, scheduler = make(resumed)
    # in this order the anchor must not be taken from the weights that are there when the optimiser is made
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    resumed.load_state_dict(state["model"])
    train(resumed, optimizer, 12 - stop, scheduler, start=stop)
    assert torch.equal(weights_of(whole), weights_of(resumed))


def test_a_loaded_state_is_not_tied_to_the_one_it_came_from():
    first, second = make_model(), make_model()
    ahead, behind = make_optimizer(first), make_optimizer(second)
    train(first, ahead, 3)
    moments = copy.deepcopy(ahead.optimizer.state_dict())  # torch itself would share these
    behind.load_state_dict(moments | {"effopd": ahead.state_dict()["effopd"]})
    second.load_state_dict(first.state_dict())
    train(first, ahead, 5, start=3)
    train(second, behind, 5, start=3)
    assert torch.equal(weights_of(first), weights_of(second))


def test_a_state_without_effopd_starts_the_count_with_a_warning():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer.optimizer, 3)
    with pytest.warns(UserWarning, match="saved without EffOPD"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    train(model, optimizer, 1)
    assert optimizer.last_search.step == 1


def test_the_state_is_the_wrapped_state_and_one_entry_more():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, 3)
    state, inner = optimizer.state_dict(), optimizer.optimizer.state_dict()
    assert set(state) == {*inner, "effopd"}
    assert state["param_groups"] == inner["param_groups"]
    other = torch.optim.AdamW(make_model().parameters())
    other.load_state_dict(state)  # the plain optimiser takes it too


@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize("kind", ["lambda", "one cycle"])
def test_schedulers_work_on_either_object(kind, wrapped_first):
    rates = []
    for wrap in (False, True):
        model = make_model()
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = EffOPDOptimizer(inner, score=lambda: 0.0) if wrap else inner
        scheduled = optimizer if wrapped_first else inner
        if kind == "lambda":
            scheduler = LambdaLR(scheduled, lambda step: 0.9**step)
        else:
            scheduler = OneCycleLR(scheduled, max_lr=0.1, total_steps=8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" would be a lie
            seen = []
            for _ in range(6):
                train(model, optimizer, 1, scheduler)
                seen.append((inner.param_groups[0]["lr"], inner.param_groups[0]["betas"]))
        rates.append(seen)
        assert optimizer.param_groups is inner.param_groups
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 6


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_unscales_and_skips(fused):
    weights = []
    for wrap in (False, True):
        model = make_model()
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        optimizer = EffOPDOptimizer(inner, score=lambda: float("nan")) if wrap else inner
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            if step == 2:
                next(model.parameters()).grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
        weights.append(weights_of(model))
        if wrap:
            assert optimizer.state_dict()["effopd"]["num_steps"] == 3
    torch.testing.assert_close(*weights, rtol=0 if not fused else 1e-6, atol=0 if not fused else 1e-7)


def test_closures_pass_through():
    model = make_model()
    inner = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    optimizer = EffOPDOptimizer(inner, score=lambda: -float(loss_of(model)), schedule=1, candidates=(1,))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(float(loss.detach()))
        return loss

    returned = optimizer.step(closure)
    assert float(returned.detach()) == losses[0]
    assert len(losses) > 1
    assert optimizer.last_search.step == 1
    with pytest.raises(TypeError, match=r"LBFGS.step\(\) missing 1 required positional argument: 'closure'"):
        optimizer.step()  # as without the wrapper


def test_hooks_of_the_wrapper_are_hooks_of_the_wrapped():
    model, calls = make_model(), []
    optimizer = make_optimizer(model)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        optimizer.register_state_dict_pre_hook(lambda *_: calls.append("saving")),
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded")),
    ]
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post", "saving", "loaded"]
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1)
    assert len(calls) == 4


def test_a_later_group_moves_from_where_it_joined():
    first, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([first], lr=1.0)
    optimizer = EffOPDOptimizer(inner, score=lambda: -float(first[0]), schedule=[2], candidates=(3,))
    for step in range(2):
        first.grad, late.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
        if step == 0:
            optimizer.add_param_group({"params": [late]})
    assert first.tolist() == [-8.0, -8.0]  # two steps, then three times two more
    assert late.tolist() == [-4.0, -4.0]
    optimizer.zero_grad()
    assert first.grad is None
    assert len(inner.param_groups) == 2


@pytest.mark.parametrize("source", ["module", "param_names", "positions"])
def test_names_for_choosing_parameters(source):
    model = make_model()
    given = model.named_parameters() if source == "param_names" else model.parameters()
    inner = torch.optim.SGD(given, lr=0.1)
    module = model if source == "module" else None
    optimizer = EffOPDOptimizer(inner, lambda: 0.0, parameters="no such name", module=module)
    names = "0.0, 0.1, 0.2, 0.3" if source == "positions" else "0.weight, 0.bias, 3.weight, 3.bias"
    with pytest.raises(ValueError, match=f"Their names are: {names}"):
        train(model, optimizer, 1)


def test_two_weights_of_one_name_are_refused():
    models = [make_model(), make_model()]
    inner = torch.optim.SGD([{"params": model.named_parameters()} for model in models], lr=0.1)
    with pytest.raises(ValueError, match=r"parameters: two trainable weights are named '0\.weight'"):
        EffOPDOptimizer(inner, lambda: 0.0).step()
    EffOPDOptimizer(inner, lambda: 0.0, module=torch.nn.ModuleList(models)).step()


def test_an_autocast_block_around_the_whole_step():
    scores = []
    for inside in (True, False):
        model = make_model()
        optimizer = make_optimizer(model, candidates=(2, 4), schedule=[1])

        def score(model=model):
            with torch.autocast("cpu", torch.bfloat16):
                scores.append(float(loss_of(model)))
            return -scores[-1]

        optimizer.score = score
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            train(model, optimizer, 1)
    assert len(set(scores)) > 1
    half = len(scores) // 2
    assert scores[:half] == pytest.approx(scores[half:], rel=0.02)


def test_copies_and_prints():
    model = make_model()
    optimizer = make_optimizer(model)
    train(model, optimizer, 2)
    twin = copy.deepcopy(optimizer)
    assert twin.state_dict()["effopd"]["num_steps"] == 2
    assert twin.param_groups is not optimizer.param_groups
    assert repr(optimizer).startswith("EffOPDOptimizer(AdamW (")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


def test_wrong_arguments_are_named():
    model = make_model()
    with pytest.raises(ValueError, match=r"optimizer: expected a torch.optim.Optimizer to wrap, got list"):
        EffOPDOptimizer([], lambda: 0.0)
    with pytest.raises(ValueError, match="score: expected a function without arguments, got 1"):
        EffOPDOptimizer(torch.optim.SGD(model.parameters()), 1)
    with pytest.raises(ValueError, match=r"anchor_device: expected null .* got 'cuda:300'"):
        EffOPDOptimizer(torch.optim.SGD(model.parameters()), lambda: 0.0, anchor_device="cuda:300")


@pytest.mark.slow
def test_in_a_hugging_face_trainer(tmp_path, tiny_qwen3_folder):
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    ids = torch.randint(7, 60, (32, 12), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def run(folder, max_steps, checkpoint=None, wrapped=True):
        model = AutoModelForCausalLM.from_pretrained(tiny_qwen3_folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        if wrapped:

            def score():
                batch = ids[:8].to(model.device)
                return -float(model(input_ids=batch, labels=batch).loss)

            optimizer = EffOPDOptimizer(optimizer, score=score, module=model)
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_steps=3,
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        scheduler = LambdaLR(optimizer, lambda step: 1.0)
        trainer = Trainer(model=model, args=settings, train_dataset=rows, optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, optimizer

    plain, _ = run(tmp_path / "plain", 6, wrapped=False)
    whole, optimizer = run(tmp_path / "whole", 6)
    assert optimizer.last_search.step == 4
    assert optimizer.last_search.accepted
    batch = ids[:8]
    with torch.no_grad():
        helped, unhelped = (model(input_ids=batch, labels=batch).loss for model in (whole, plain))
    assert helped < unhelped
    run(tmp_path / "part", 3)
    resumed, _ = run(tmp_path / "again", 6, checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert torch.equal(weights_of(whole), weights_of(resumed))
