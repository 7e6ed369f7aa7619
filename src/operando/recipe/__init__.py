"""Every setting of a run: frozen pydantic models, TOML files, `a.b=value` overrides.

One recipe is one TOML file is one arm. Variants are tagged unions (`kind = "..."`); a feature that
is off is a table that is absent. A recipe may name one `base = "other.toml"`, which it is merged
over (tables merge, everything else replaces). All mistakes are reported at once.
"""

from operando.recipe.base import Config as Config
from operando.recipe.data import CanaryTaskConfig as CanaryTaskConfig
from operando.recipe.data import Gsm8kTaskConfig as Gsm8kTaskConfig
from operando.recipe.data import LoraConfig as LoraConfig
from operando.recipe.data import Math500TaskConfig as Math500TaskConfig
from operando.recipe.data import MmluTaskConfig as MmluTaskConfig
from operando.recipe.data import ModelConfig as ModelConfig
from operando.recipe.data import PromptConfig as PromptConfig
from operando.recipe.data import RolloutConfig as RolloutConfig
from operando.recipe.data import WordsTaskConfig as WordsTaskConfig
from operando.recipe.pretrain import PretrainRecipe as PretrainRecipe
from operando.recipe.pretrain import TinyModelConfig as TinyModelConfig
from operando.recipe.projection import AblateIntervention as AblateIntervention
from operando.recipe.projection import InterventionConfig as InterventionConfig
from operando.recipe.projection import PenaltyShift as PenaltyShift
from operando.recipe.projection import ProjectionConfig as ProjectionConfig
from operando.recipe.projection import ReboundShift as ReboundShift
from operando.recipe.projection import ScreeningShift as ScreeningShift
from operando.recipe.projection import ShiftConfig as ShiftConfig
from operando.recipe.projection import SuppressIntervention as SuppressIntervention
from operando.recipe.rewards import NOWAIT_WORDS as NOWAIT_WORDS
from operando.recipe.rewards import REASONSCORE_WORDS as REASONSCORE_WORDS
from operando.recipe.rewards import SEED_WORDS as SEED_WORDS
from operando.recipe.rewards import STEP_WORDS as STEP_WORDS
from operando.recipe.rewards import ContainsAnswerReward as ContainsAnswerReward
from operando.recipe.rewards import CorrectReward as CorrectReward
from operando.recipe.rewards import FeatureReward as FeatureReward
from operando.recipe.rewards import FormatReward as FormatReward
from operando.recipe.rewards import FunctionReward as FunctionReward
from operando.recipe.rewards import RewardConfig as RewardConfig
from operando.recipe.rewards import ScorerReward as ScorerReward
from operando.recipe.rewards import Stage as Stage
from operando.recipe.rewards import StepGrpoReward as StepGrpoReward
from operando.recipe.rewards import StepPenaltyReward as StepPenaltyReward
from operando.recipe.rewards import TagFenceReward as TagFenceReward
from operando.recipe.rewards import ThinkFormatReward as ThinkFormatReward
from operando.recipe.run import CheckpointConfig as CheckpointConfig
from operando.recipe.run import DiscoverConfig as DiscoverConfig
from operando.recipe.run import EvalConfig as EvalConfig
from operando.recipe.run import ParallelConfig as ParallelConfig
from operando.recipe.run import Recipe as Recipe
from operando.recipe.run import TaskConfig as TaskConfig
from operando.recipe.run import TrackingConfig as TrackingConfig
from operando.recipe.study import Claim as Claim
from operando.recipe.study import DifferenceClaim as DifferenceClaim
from operando.recipe.study import EmergenceClaim as EmergenceClaim
from operando.recipe.study import EmergenceDifferenceClaim as EmergenceDifferenceClaim
from operando.recipe.study import EquivalenceClaim as EquivalenceClaim
from operando.recipe.study import EvaluationConfig as EvaluationConfig
from operando.recipe.study import MetricConfig as MetricConfig
from operando.recipe.study import ParetoConfig as ParetoConfig
from operando.recipe.study import RateClaim as RateClaim
from operando.recipe.study import StudyRecipe as StudyRecipe
from operando.recipe.update import AdvantageConfig as AdvantageConfig
from operando.recipe.update import CispoLoss as CispoLoss
from operando.recipe.update import ClipLoss as ClipLoss
from operando.recipe.update import GaeAdvantage as GaeAdvantage
from operando.recipe.update import GroupAdvantage as GroupAdvantage
from operando.recipe.update import GspoTokenLoss as GspoTokenLoss
from operando.recipe.update import KlConfig as KlConfig
from operando.recipe.update import OptimConfig as OptimConfig
from operando.recipe.update import OtherGroupsAdvantage as OtherGroupsAdvantage
from operando.recipe.update import PolicyLossConfig as PolicyLossConfig
from operando.recipe.update import RewardToGoAdvantage as RewardToGoAdvantage
from operando.recipe.update import RlooAdvantage as RlooAdvantage
from operando.recipe.update import UpdateConfig as UpdateConfig
