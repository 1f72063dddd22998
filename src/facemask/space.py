"""What a sweep searches: its config, the space in hydra-optuna-sweeper's grammar, and the recipe's own values."""

from collections.abc import Sequence
from typing import Any

import optuna
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from facemask.config import check, composed, user_sentence
from facemask.errors import UserError
from facemask.runs.metrics import SCALARS

OURS = ("run_dir", "resume", "seed", "evaluate.splits", "name", "hydra.run.dir")
Distribution = Any  # of optuna.distributions


def read(arguments: Sequence[str]) -> DictConfig:
    """The config of a sweep (conf/sweep.yaml) from the command line, with `space` and `overrides` complete.

    An override of train.py that names several values, such as optim.lr=interval(1e-4,1e-2), belongs to the space.

    Raises:
        UserError: not an override, or one that the sweep itself gives to every trial.
    """
    if flags := [argument for argument in arguments if argument.startswith("-")]:
        raise UserError(f"{flags[0]}: sweep.py takes overrides only (sweep=NAME n_workers=2 optim.lr=...)")
    own = [a for a in arguments if a.lstrip("+~").startswith(("sweep=", "sweep.", "sweep/", "n_workers="))]
    cfg = composed(*own, name="sweep")
    OmegaConf.set_struct(cfg, False)
    sweep = cfg.sweep
    for override in OverridesParser.create().parse_overrides([a for a in arguments if a not in own]):
        key = override.key_or_group
        if key in OURS:
            mend = {"seed": "sweep.seeds=[...]", "name": "sweep.name=...", "evaluate.splits": "facemask sweep finish"}
            raise UserError(f"{key} is set by the sweep for every trial (validation only): see {mend.get(key, 'conf')}")
        if override.is_sweep_override():
            sweep.space[key] = str(override.input_line).split("=", 1)[1]
        else:
            sweep.overrides.append(override.input_line)
    if not isinstance(cfg.n_workers, int) or cfg.n_workers < 1:
        raise UserError(f"n_workers={cfg.n_workers} must be a whole number of at least 1")
    if not any(isinstance(b, int | float) and b > 0 for b in (sweep.trials, sweep.hours)):
        raise UserError("a sweep needs an end: give sweep.trials, the number of trials in all, or sweep.hours")
    for name in sweep.objectives:
        if name.split("/")[0] not in ("val", "training") or (name[:4] == "val/" and name[4:] not in SCALARS):
            known = ", ".join(f"val/{metric}" for metric in SCALARS)
            raise UserError(f"sweep.objectives: a sweep does not report {name}: choose of {known}, training/FIGURE")
    if len(sweep.directions) != len(sweep.objectives) or not {"minimize", "maximize"} >= set(sweep.directions):
        raise UserError(f"sweep.directions={sweep.directions} must say minimize or maximize for each of the objectives")
    if not sweep.objectives or not sweep.space or not sweep.seeds:
        raise UserError("sweep.objectives, sweep.space and sweep.seeds must each hold something")
    return cfg


def distribution(key: str, text: str) -> Distribution:
    """What a value of the space stands for, by the rules of hydra-optuna-sweeper; choices are kept as they are written.

    Raises:
        UserError: no range, or an empty one.
    """
    distributions = optuna.distributions
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        value: Any = override.value()
        kind = type(value)
        if kind is ChoiceSweep:
            return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
        if kind is RangeSweep:
            whole = all(isinstance(x, int) for x in (value.start, value.stop, value.step))
            number = distributions.IntDistribution if whole else distributions.FloatDistribution
            return number(value.start, value.stop, step=value.step)
        if kind is IntervalSweep and "int" in value.tags:
            return distributions.IntDistribution(int(value.start), int(value.end), log="log" in value.tags)
        if kind is IntervalSweep:
            return distributions.FloatDistribution(value.start, value.end, log="log" in value.tags)
    except (HydraException, TypeError, ValueError) as error:  # of Hydra's grammar, or of Optuna: low above high
        raise UserError(f"sweep.space: {key}: {text} holds no values ({' '.join(str(error).split())})") from error
    raise UserError(f"sweep.space: {key}: {text} is no range: write interval(a, b), range(a, b) or choice(a, b)")


class Space:
    """The parameters of a sweep.

    Args:
        space: parameter -> text of its range.
        when: parameter -> text of its condition on an earlier one, such as distill=soft.
    """

    def __init__(self, space: dict[str, str], when: dict[str, str]) -> None:
        self.distributions = {key: distribution(key, text) for key, text in space.items()}
        self.when: dict[str, tuple[str, list[str]]] = {}
        for key, text in when.items():
            condition = OverridesParser.create().parse_override(text)
            values = list(condition.sweep_string_iterator()) if condition.is_sweep_override() else [text.split("=")[1]]
            names = list(self.distributions)
            if key not in names or condition.key_or_group not in names[: names.index(key)]:
                raise UserError(f"sweep.when: {key}: {text} must name a parameter and an earlier one of sweep.space")
            self.when[key] = (condition.key_or_group, values)

    def applies(self, key: str, params: dict[str, Any]) -> bool:
        """Whether the parameter exists beside the earlier ones."""
        if key not in self.when:
            return True
        other, values = self.when[key]
        return other in params and str(params[other]) in values

    def first(self, overrides: list[str]) -> dict[str, Any]:
        """The recipe's own values; the ends of all ranges are checked as well.

        Raises:
            UserError: train.py knows no such key or refuses a value, or the recipe's value lies outside the space.
        """
        most = max(len(getattr(dist, "choices", "1")) for dist in self.distributions.values())
        for number in range(2 * most):
            corner: dict[str, Any] = {}
            for key, dist in self.distributions.items():
                ends = dist.choices if hasattr(dist, "choices") else [(dist.low, dist.high)[number // most]]
                if self.applies(key, corner):
                    corner[key] = ends[number % len(ends)]
            try:
                check(_compose([*overrides, *(f"{key}={value}" for key, value in corner.items())]))
            except Exception as error:
                sentence = user_sentence(error)
                if sentence is None:
                    raise
                raise UserError(f"sweep.space: {sentence}") from error
        recipe = _compose(overrides)
        choices = HydraConfig.get().runtime.choices
        params: dict[str, Any] = {}
        for key, dist in self.distributions.items():
            if not self.applies(key, params):
                continue
            value = choices[key] if key in choices else OmegaConf.select(recipe, key)
            if hasattr(dist, "choices"):
                value = next((choice for choice in dist.choices if yaml.safe_load(choice) == value), value)
                inside = value in dist.choices
            else:
                inside = isinstance(value, int | float) and dist._contains(dist.to_internal_repr(value))
            if not inside:
                first = f"the first trial takes the recipe's own values, and {value} is not in the range"
                raise UserError(f"sweep.space: {key}: {first}: widen it, or override the value")
            params[key] = value
        return params

    def suggest(self, trial: optuna.Trial) -> None:
        for key, dist in self.distributions.items():
            if self.applies(key, trial.params):
                trial._suggest(key, dist)


def _compose(overrides: list[str]) -> DictConfig:
    cfg = composed(*overrides, hydra=True)
    HydraConfig.instance().set_config(cfg)
    return cfg
