"""The public names: this list, importable from the top, described, on the site. None leaves without a warning first."""

import inspect
import re
import sys
from pathlib import Path

import pytest

import opd_lightning
from opd_lightning import interfaces
from opd_lightning.commands.parser import SEAMS, class_at
from opd_lightning.commands.short_names import import_rooms

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import reference  # noqa: E402

NAMES = """
AboveFloorThenUncertain AdaptiveHorizon Advantage AgreementWeight AnswersWriter AntiSelfDistillation ArithmeticTask
BalancedMarks BaseModelTeacher BestOfTeacher Blend Calculator CandidateScore CleanedTask Clipped ClippedForwardKL
Connection ConstantHorizon CrossTokenizerTeacher DataSource DebiasedTeacher DemonstratedOnly DifficultyPool Direct
Divergence DivergenceObjective DriftWeights EffOPD EffOPDOptimizer EntropyAware EntropyGate EntropyGuard
EntropyWeights Estimator ExtrapolatedTeacher FSDP2Strategy FileTransfer Filtered Floor ForwardKL
ForwardKLWhereNegative FullVocabulary GroupReward GrowingHorizon HFEngine HFStudent HFTeacher HeldOutGuard HeldOutLoss
HeldOutMarks Horizon Importance InOrder Intersection JensenShannon Judge KLBaseline LateEntropyGuard
LearningRateLineSearch LedgerTask LengthGuard LinearHead LiveReport LiveStudent LongReturn LoraSettings Margin
MarginMask MarginShift Masked MathTask MeanOverTeachers MicroBatch MismatchAlarm MixedData MixedTask Mixture
MixtureTeacher MovingAverageTeacher NCCLTransfer NLL OPDDataModule OPDModule Objective OnPolicy OneStepAhead
OverlapGuard PeerTeacher PlainEngine PositionWeights PrintSamples PrivilegedTeacher Problem ProjectedGradients Prompt
PromptBatch PromptOutcome PromptSelector PromptTask PruningHorizon RateSearch RemainingSignal RescueCheckpoint
ResponseTokens Reuse ReverseKL RewardFloor Rollout RolloutBatch RolloutEngine RolloutSource RoundPart Routed
RubricJudge RubricObjective SDPOObjective SampledToken SampledTokenObjective Sampling Score ScoreObjective
ScoreRequest ScoredTask Shuffled SimCT SourceMetrics StartValidation StepFacts StepProgressBar StepPrompts StepWeights
Stored StoredTeacher Student StudentScores StudentSummary StudentTopK Support SymmetricDifference TIP Task
TaskAccuracy Teacher TeacherKL TeacherKLOnFixedRollouts TeacherKLOnNewRollouts TeacherMixed TeacherScores TeacherTopK
TokenRecorder TokenWeighting Tokenizer Tool ToolUse TrainedRollout Truncated TwoContexts Uncorrected Union
UpdateRecorder UpsampledByPasses VLLMColocatedEngine VLLMServerEngine VLLMServerTeacher Veto WarmupDecay Weighted
WeightsLost WholeCheckpoints export render_token_page
""".split()  # noqa: SIM905
# made by trainer and command; what two callbacks or two tasks share; a task of the zoo
INTERNAL = {
    "KeptScores",
    "MadeUpTask",
    "NotationTask",
    "PlanLine",
    "RunRecords",
    "TaskAround",
    "TeacherElsewhere",
    "WeightSearch",
}


def test_the_names_are_these():
    assert sorted(NAMES) == NAMES
    assert sorted(opd_lightning.__all__) == NAMES


def test_the_seams_and_their_words_are_public():
    classes = {name for name in interfaces.__all__ if inspect.isclass(getattr(interfaces, name))}
    assert classes <= set(NAMES)


def test_what_a_configuration_may_name_can_be_imported_from_the_top():
    import_rooms()
    shipped = {cls.__name__ for seam in SEAMS.values() for cls in reference.shipped(seam)}
    assert shipped - INTERNAL <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_says_what_it_needs(name):
    value = getattr(opd_lightning, name)
    assert (value.__doc__ or "").strip() and not value.__doc__.startswith(f"{name}(")
    texts = "\n".join(inspect.getdoc(cls) or "" for cls in getattr(value, "__mro__", [value]))
    takes_anything = not inspect.isclass(value) or not issubclass(value, Exception)
    for parameter in inspect.signature(value).parameters.values() if takes_anything else ():
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            assert re.search(rf"^ *\b{parameter.name}\b.*:|`{parameter.name}`", texts, re.M), parameter.name


def test_every_public_name_is_on_the_site():
    pages = reference.pages_of_names()
    paths = re.findall(r"^::: (\S+)$", "\n".join(pages.values()), flags=re.M)
    assert set(NAMES) <= {path.rpartition(".")[2] for path in paths}
    assert all(class_at(path) for path in paths)


def test_a_command_has_a_page_with_its_options():
    page = reference.command("export")
    assert page.startswith("# export\n")
    assert "--ckpt_path" in page and "--data.prompts_per_step" not in page
    assert "(commands/fit.md)" in reference.commands_index()


def test_a_method_has_a_page_that_says_where_it_is_named():
    pages = reference.pages_of_names()
    assert "`model.objective.divergence: ForwardKL`" in pages["reference/methods/ForwardKL.md"]
    assert "`trainer.callbacks: [EntropyGuard]`" in pages["reference/methods/EntropyGuard.md"]
