"""A run as data: frozen pydantic models that refuse unknown keys, YAML on disk, ``--set a.b=value`` on top.

Precedence: defaults < file < ``--set`` < explicit flags. Nothing of ours is imported here but the errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tad.errors import RecipeError, did_you_mean

ModelT = TypeVar("ModelT", bound=BaseModel)


class Model(BaseModel):
    """Base of all recipes: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ExtractRecipe(Model):
    """How one stream is made from videos (``tad extract``). Lengths in frames count frames of the grid at ``fps``.

    ``None`` means: what the backbone declares. ``fps`` "native" is each file's own average rate, which is also what
    backbones mean that declare none.
    """

    backbone: str
    weights: str | None = None
    window: int | None = Field(default=None, ge=1)
    interval: int | None = Field(default=None, ge=1)
    stride: int | None = Field(default=None, ge=1)
    fps: Annotated[float, Field(gt=0)] | Literal["native"] | None = None
    short_side: int | None = Field(default=None, ge=16)
    crop: tuple[int, int] | Literal["full"] | None = None
    flow: str | None = None
    levels: bool = False
    maps: tuple[str, ...] = ()  # stage outputs kept with height and width, s4 as the level s4-map
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    interpolate_positions: bool = False  # let a transformer take another size or length than it was trained with
    port: str | None = None  # whose arithmetic, where implementations of the network differ; None: the checkpoint's


class DataRecipe(Model):
    """Which videos a detector sees, and how their rows are handed over."""

    # None: "training"; where the annotations have none, "validation", as THUMOS14's detectors are trained on it
    train_subset: str | None = None
    # part of the training videos kept aside to choose the checkpoint by mAP
    holdout: float = Field(default=0.1, ge=0, lt=1)
    holdout_subset: str | None = None  # a subset of its own for that, instead of a part of the training videos
    row_spacing: int = Field(default=1, ge=1)  # this many neighbouring rows are averaged into one
    max_rows: int = Field(default=4096, ge=1)  # longer videos are cut at random in training; detection always sees all
    # for detectors that see windows: rows from one to the next, half a window by default
    train_stride: int | None = Field(default=None, ge=1)
    detect_stride: int | None = Field(default=None, ge=1)
    # a truth belongs to a window, or a random cut of a long video, that holds this part of it
    min_inside: float = Field(default=0.5, gt=0, le=1)
    empty_windows: bool = False  # train on windows without truth as well
    longer_than_s: float = Field(default=0.0, ge=0)  # shorter actions of training videos are no truth, as HACS' <= 1 s
    # for detectors that see videos rescaled: read at the new rows' centres, or averaged over them
    rescale: Literal["linear", "average"] = "linear"
    workers: int = Field(default=0, ge=0)


class TrainRecipe(Model):
    """How a detector is trained; every detector's own values stand in its recipe files."""

    epochs: int = Field(default=20, ge=1)
    batch_videos: int = Field(default=1, ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "cosine", "step"] = "constant"
    step_epochs: tuple[int, ...] = ()
    step_gamma: float = Field(default=0.1, gt=0)
    warmup_epochs: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    feature_dropout: float = Field(default=0.0, ge=0, lt=1)  # this part of the features' values is zero in each step
    ema: float | None = Field(default=None, gt=0, lt=1)
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    select: Literal["map", "last"] = "map"
    eval_every: int = Field(default=1, ge=1)


class PostprocessRecipe(Model):
    """Suppression of decoded segments, per video and class unless ``class_agnostic``.

    ``soft_nms`` multiplies the scores of rivals by a factor (``decay``): ``exp(-tIoU ** power / sigma)``, ``1 - tIoU``
    or 0. Rivals are those with tIoU of at least ``soft_tiou``; with ``soft_tiou_high`` the threshold grows to it with
    the share of its video that the kept segment fills.
    """

    method: Literal["nms", "soft_nms", "none"] = "nms"
    tiou: float = Field(default=0.7, ge=0, le=1)
    sigma: float = Field(default=0.5, gt=0)
    decay: Literal["gaussian", "linear", "hard"] = "gaussian"
    power: float = Field(default=2.0, gt=0)
    soft_tiou: float = Field(default=0.0, ge=0, le=1)
    soft_tiou_high: float | None = Field(default=None, ge=0, le=2)
    voting: float | None = Field(default=None, gt=0, le=1)  # from this tIoU on, suppressed segments move the kept ones
    voting_by_tiou: bool = True  # their weight is score times tIoU, else the score alone
    min_length_s: float = Field(default=0.0, ge=0)  # shorter segments are left out
    min_score: float = Field(default=1e-3, ge=0)
    max_segments: int = Field(default=200, ge=1)
    pre_topk: int = Field(default=2000, ge=1)
    class_agnostic: bool = False


class ClassifierRecipe(Model):
    """How a classifier of whole videos is trained on stored features (``tad train-classifier``)."""

    epochs: int = Field(default=15, ge=1)
    batch_videos: int = Field(default=4, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    width: int = Field(default=64, ge=1)
    dilations: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4, 8)
    dropout: float = Field(default=0.3, ge=0, lt=1)
    rows_weight: float = Field(default=1.0, ge=0)  # of learning from segments; 0: from the labels of videos alone
    # the weights to keep: those of the last epoch, or of the one that ranks the held-out videos best
    select: Literal["last", "map"] = "last"


class ClassesRecipe(Model):
    """Where class-agnostic proposals get their classes: scores of whole videos, which multiply their own.

    ``product`` is score times class score, ``sqrt`` its square root.
    """

    scores: str | None = None  # file of scores by video; None: a classifier trained along, on the stored features
    softmax: float | None = Field(default=None, gt=0)  # the file holds logits: probabilities are softmax(factor * them)
    top: int = Field(default=2, ge=1)  # so many of a video's best classes, for each of its proposals
    combine: Literal["product", "sqrt"] = "product"
    max_segments: int | None = Field(default=None, ge=1)  # the best of a video after that; None: all
    classifier: ClassifierRecipe = ClassifierRecipe()  # how it is trained, where no scores are given


class ProposalsRecipe(Model):
    """Whose proposals a refining detector starts from."""

    run: str | None = None  # folder of the run that finds them; it is copied into the new run
    top: int = Field(default=100, ge=1)  # the best of a video after suppression
    postprocess: PostprocessRecipe | None = None  # their suppression; None: that of their run


class JointRecipe(Model):
    """How a backbone is trained with its detector (``tad train-joint``): ETAD Section 3.2.1 and Table 1.

    ``egs`` lets gradients through a sample of the snippets and computes the others without, ``full`` through all,
    ``bank`` takes the others from a bank of earlier ones, ``pre-extracted`` reads the store's rows and trains the
    detector alone.
    """

    mode: Literal["egs", "full", "bank", "pre-extracted"] = "egs"
    ratio: float = Field(default=0.3, ge=0, le=1)  # part of a sample's snippets that gradients go through
    sampler: Literal["random", "grid", "block", "fps", "dpp"] = "random"
    chunk: int = Field(default=8, ge=1)  # clips in a forward pass of the backbone
    checkpoint: bool = False  # forget a chunk's activations and compute them again in the backward pass
    backbone_lr: float = Field(default=1e-6, ge=0)  # where the detector's is train.lr; both follow its schedule
    frozen_stages: int = Field(default=2, ge=0, le=4)
    frozen_norms: bool = True
    random_crop: bool = True  # these three are drawn once a sample, for all its frames and streams
    flip: bool = False
    jitter: bool = False
    frames: str = "frames"  # the raw stream that backbones of colour read
    flow_frames: str = "flow-frames"  # and that backbones of flow read
    videos: str | None = None  # a file, folder or list: decode these videos instead


class DetectRecipe(Model):
    """A detector's whole run: what it reads, what it is, how it learns, what happens to its output."""

    detector: str
    streams: tuple[str, ...] = Field(min_length=1)
    seed: int = 0
    model: dict[str, Any] = Field(default_factory=dict)  # keyword arguments of the detector's class
    data: DataRecipe = DataRecipe()
    train: TrainRecipe = TrainRecipe()
    postprocess: PostprocessRecipe = PostprocessRecipe()
    classes: ClassesRecipe = ClassesRecipe()  # of class-agnostic detectors
    proposals: ProposalsRecipe = ProposalsRecipe()  # of detectors that refine another one's
    joint: JointRecipe | None = None  # of trainings together with the backbone

    @model_validator(mode="after")
    def _streams_are_distinct(self) -> DetectRecipe:
        if len(set(self.streams)) != len(self.streams):
            raise ValueError(f"streams repeat: {', '.join(self.streams)}")
        return self


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-4`` as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*(?:\.[\d_]*)?(?:[eE][-+]?\d+)|\d[\d_]*\.[\d_]*|\.\d[\d_]*(?:[eE][-+]?\d+)?|\.(?:inf|nan))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, where: str) -> Any:
    """YAML text → plain data. Raises :class:`RecipeError` naming ``where``."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from error


def load_mapping(path: str | Path) -> dict[str, Any]:
    """A recipe file as a mapping. Raises :class:`RecipeError` when it is missing or is not a mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text (byte {error.start}); save it again as UTF-8") from None
    data = parse_yaml(text, where=str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, this holds {type(data).__name__}")
    return data


def apply_sets(data: Mapping[str, Any], sets: Iterable[str]) -> dict[str, Any]:
    """``data`` with every ``a.b=value`` applied; values are YAML (``[1, 2]``, ``1e-4``, ``true``)."""
    result = _copied(data)
    for item in sets:
        dotted, equals, text = item.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"--set {item}: expected key=value, such as --set train.epochs=10")
        node = result
        for key in keys[:-1]:
            child = node.setdefault(key, {})
            if not isinstance(child, dict):
                raise RecipeError(f"--set {item}: '{key}' is a value, it has no keys below it")
            node = child
        node[keys[-1]] = parse_yaml(text, where=f"--set {item}")
    return result


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in data.items()}


def validated(model: type[ModelT], data: Mapping[str, Any], *, where: str) -> ModelT:
    """``data`` as a ``model``; every problem in one :class:`RecipeError`, unknown keys with a suggestion."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                known = _keys_at(model, problem["loc"][:-1])
                lines.append(f"unknown key '{place}'.{did_you_mean(str(problem['loc'][-1]), known)}")
            else:
                lines.append(f"{place or 'recipe'}: {problem['msg']} (got {problem.get('input')!r})")
        raise RecipeError(f"{where}: " + "; ".join(lines)) from None


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    node: Any = model
    for part in location:
        field = node.model_fields.get(str(part)) if isinstance(node, type) and issubclass(node, BaseModel) else None
        node = None if field is None else _model_in(field.annotation)
    return list(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    """The model of an annotation such as ``JointRecipe | None``; any other annotation as it is."""
    models = [one for one in get_args(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]
    return models[0] if models else annotation


def dump_yaml(recipe: BaseModel) -> str:
    """A recipe as YAML text that :func:`load_mapping` and :func:`validated` read back unchanged."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
