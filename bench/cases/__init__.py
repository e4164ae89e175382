"""The cases, one file each."""

from ..registry import Case
from .ablation import Ablation
from .cold_start import ColdStart
from .data_sets import DataSets
from .evaluations import Evaluations
from .explanations import Explanations
from .operations import Operations
from .resolution import Resolution

CASES: dict[str, Case] = {
    case.name: case for case in (Explanations(), Ablation(), Resolution(), Operations(), ColdStart(), Evaluations(), DataSets())
}
