"""Train the starter model with a reward function written for TRL, unchanged."""

from operando.display import make_console
from operando.launch import launch
from operando.recipe import FunctionReward, LoraConfig, ModelConfig, Recipe, WordsTaskConfig
from operando.run import free_name


def ends_with_gold(completions, answer, **kwargs):
    """Pay 1 for a completion that ends with the gold answer; `answer` is a dataset column."""
    pairs = zip(completions, answer, strict=True)
    return [1.0 if text.rstrip().endswith(f"#### {gold}") else 0.0 for text, gold in pairs]


recipe = Recipe(
    name=free_name("runs", "trl-reward"),
    steps=4,
    model=ModelConfig(id="starter", lora=LoraConfig(rank=8)),
    task=WordsTaskConfig(kind="words", num_train=200, num_held_out=32),
    rewards={"mine": FunctionReward(kind="function")},
)
folder = launch(make_console(), recipe, functions={"mine": ends_with_gold})
print(folder)
