"""What a run minimises, by its settings: what train.py's loop calls."""

from data import TrainingData
from dataset.encoding import AS_PROMPTS
from model import Transformer
from objectives import RunObjective, kind_of_examples, make_objective, token_logps
from tokenizer import Tokenizer
from training.defaults import Settings
from training.distillation import DistillRun, OwnAnswersRun, Teacher
from training.on_policy import OnPolicyRun
from training.reference import reference_of_run
from training.rewards import rewards_of_run


def objective_of_run(
    settings: Settings, model: Transformer, tokenizer: Tokenizer, data: TrainingData
) -> RunObjective:
    """Returns a run's objective: of examples as the data hold them, or of answers that the model writes."""
    if settings.objective == "distill":
        teacher = Teacher(settings, model, tokenizer)
        if kind_of_examples(settings) == AS_PROMPTS:
            return OwnAnswersRun(settings, tokenizer, data, teacher)
        return DistillRun(settings, teacher)
    if kind_of_examples(settings) == AS_PROMPTS:
        rewards = rewards_of_run(settings, model.dtype, model.device)
        reference = reference_of_run(settings, model, lambda batch: token_logps(model, batch))
        return OnPolicyRun(settings, tokenizer, data, rewards, reference)
    return make_objective(settings, reference_of_run(settings, model))
