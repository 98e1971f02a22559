"""The configuration of a training run as frozen, validated data; imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from storage.config import Folder, Settings, name_values, parse_yaml
from storage.format.manifest.shared import ADDED, TEACHER_NAME
from student.data.available import check_available
from student.loss.objective import LIGHTNING_OPD, Objective
from student.models.adapters.lora import Lora


class TeacherWeight(Settings):
    """One member of the mixture. Weights are relative: they are normalised to sum 1.

    sources: those in whose documents it teaches; by default in all for which it has targets.
    """

    name: Annotated[str, Field(pattern=f"^{TEACHER_NAME}$")]
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    sources: tuple[Annotated[str, Field(min_length=1)], ...] | None = ADDED

    @model_validator(mode="after")
    def _names_sources_once(self) -> TeacherWeight:
        if self.sources is not None and len(set(self.sources)) != max(1, len(self.sources)):
            raise ValueError(
                f"teacher {self.name}: name each source once, and one at least; got {', '.join(self.sources) or 'none'}"
            )
        return self

    @property
    def in_documents(self) -> str:
        """` in documents of math, code`; nothing for a teacher of all documents."""
        return "" if self.sources is None else f" in documents of {', '.join(self.sources)}"


class StudentJob(Objective):
    """A training run. Without teachers it is plain cross-entropy: a teacher, or the control without distillation.

    cache               path or URL of the cache to train on
    teachers            entries of the cache to learn from; "NAME[:WEIGHT][@source=SOURCE]", with one source or several,
                        is understood
    model               preset, JSON configuration, model directory or hub id
    attention           implementation of attention for transformers to use; by default its own choice
    lora                train a LoRA on the model's weights, which stay as they are; where the model is the directory of
                        an adapter, training continues with that one
    merge               save a whole model, the LoRA merged into its weights, in place of the adapter
    save_dtype          of the saved weights; by default that of a student's own weights on disk, float32 for a new one
                        and for an adapter. Training computes in float32, or as the training fields say
    window_tokens       positions of a training window; by default 128, and for a model with weights as long as the
                        cached teachers' longest context (1,024 without any), within what the model and the texts have
    offset              fixed blocks, or a random offset for every block and epoch
    isolate_documents   whether windows stay inside documents; by default as for the teachers
    bos_each_window     whether BOS is put before windows that start elsewhere; by default as for the teachers
    pack_documents      whether documents that windows stay inside share windows, or each is padded to a window; by
                        default they share them, but for loss_scale babyllama, which sums over windows
    fused_head          fuse LM head and loss, without ever holding the logits of a batch; auto: if the model's LM head
                        allows it. The same loss and gradients up to rounding
    windows_per_step    windows of an optimizer step over all processes and micro-batches; gradient accumulation follows
                        from it, and per_device_train_batch_size is the limit of a process's micro-batch. By default
                        per_device_train_batch_size * processes * gradient_accumulation_steps
    output_dir          directory of this run alone: checkpoints while it runs, the model when it is done
    eval_cache          path or URL of a held-out cache of the same tokenizer
    available           train on the committed shards of entries that are still being written: those of the start, which
                        are recorded; or on these ranges of positions, by teacher, as a run has recorded them
    live_teachers       model directories or hub ids that run beside the student instead of targets from the cache:
                        for comparison, and for `train-teacher` only
    combine             how several live teachers are combined: the mean of their logits, or a mixture
    seed                of weights, order, offsets and dropout
    training            fields of transformers.TrainingArguments (`student.training.arguments` has the defaults,
                        `student.training.defaults` those of a model with weights)

    The other fields are those of `student.loss.objective.Objective`. alpha defaults to 1 without teachers (the only
    choice), to 0 where the targets are an unbiased sample, the text the student's own, or the teachers live, and to 0.5
    elsewhere.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    cache: str
    teachers: tuple[TeacherWeight, ...] = ()
    model: str
    attention: str | None = None
    lora: Lora | None = None
    merge: bool = False
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    window_tokens: Annotated[int, Field(ge=1, le=1 << 24)] = 128
    offset: Literal["fixed", "random"] = "fixed"
    isolate_documents: bool | None = None
    bos_each_window: bool | None = None
    pack_documents: bool | None = None
    fused_head: Literal["auto", "on", "off"] = "auto"
    windows_per_step: Annotated[int, Field(ge=1)] | None = None
    output_dir: Annotated[Folder, Field(min_length=1)]
    eval_cache: str | None = None
    available: bool | dict[str, tuple[tuple[int, int], ...]] = False
    live_teachers: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    combine: Literal["logit-mean", "mixture"] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    training: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _default_alpha(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("alpha") is None:
            data = {name: value for name, value in data.items() if name != "alpha"}
            if data.get("loss") == LIGHTNING_OPD:
                data["alpha"] = 0.0
            elif not data.get("teachers"):
                data["alpha"] = 0.0 if data.get("live_teachers") else 1.0
        return data

    @property
    def leaves_alpha_open(self) -> bool:
        """Whether alpha is not set, so that its default depends on the targets."""
        return bool(self.teachers) and "alpha" not in self.model_fields_set and self.alpha_end is None

    @field_validator("teachers", mode="before")
    @classmethod
    def _parse_teachers(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return [{"name": name, "weight": weight} for name, weight in value.items()]
        if isinstance(value, (list, tuple)):
            return [_parse_teacher(item) for item in value]
        return value

    @model_validator(mode="after")
    def _agrees(self) -> StudentJob:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"each teacher may be named once, with its whole weight; got {', '.join(names)}")
        if self.available is not False:
            self._agrees_available(names)
        if self.live_teachers:
            self._agrees_live()
        elif self.combine is not None:
            raise ValueError(f"combine {self.combine} belongs to live teachers; cached ones are combined by --teacher")
        elif not names and self.uses_teachers:
            if self.loss == LIGHTNING_OPD:
                raise ValueError(f"loss {self.loss} needs a teacher's log-probs of the rollouts: name one")
            asked = self.alpha if self.alpha < 1 else self.alpha_end
            raise ValueError(f"alpha is {asked:g} but no teacher is named: name one, or leave alpha at 1")
        if self.pack_documents and self.loss_scale == "babyllama":
            raise ValueError("loss_scale babyllama sums over windows, which packed documents share: leave one out")
        if names and self.uses_teachers and not any(teacher.weight for teacher in self.teachers):
            raise ValueError("every teacher's weight is 0: give at least one a weight above 0")
        if self.windows_per_step is not None and "gradient_accumulation_steps" in self.training:
            raise ValueError(
                f"windows_per_step {self.windows_per_step} decides gradient_accumulation_steps, which is also given as "
                f"{self.training['gradient_accumulation_steps']}: leave one of the two out"
            )
        return self

    def _agrees_available(self, names: list[str]) -> None:
        if not names:
            raise ValueError("available is about entries that are still being written: name a teacher, or leave it out")
        if isinstance(self.available, dict):
            check_available(self.available, names)

    def _agrees_live(self) -> None:
        if self.teachers:
            raise ValueError("targets come from the cache or from live teachers, not from both")
        if self.tail != "auto":
            raise ValueError(f"live teachers have no tail to treat: leave tail out (found {self.tail})")
        if self.loss == "tail-aware-kl":
            raise ValueError("loss tail-aware-kl is for targets from a cache: take another with live teachers")
        if self.loss == LIGHTNING_OPD:
            raise ValueError(f"loss {self.loss} is of cached log-probs: take reverse-kl with live teachers")
        if (len(self.live_teachers) > 1) != (self.combine is not None):
            raise ValueError(
                "several live teachers are combined as logit-mean or mixture, and one is not: "
                f"got {len(self.live_teachers)} and combine {self.combine}"
            )


def _parse_teacher(item: Any) -> Any:
    if not isinstance(item, str):
        return item
    # A source may have any name, one with a colon too, so it comes last.
    member, *sources = item.split("@source=")
    name, colon, weight = member.partition(":")
    found: dict[str, Any] = {"name": name} | ({"sources": sources} if sources else {})
    if not colon:
        return found
    try:
        return found | {"weight": float(weight)}
    except ValueError:
        raise ValueError(
            f"{item!r}: expected NAME or NAME:WEIGHT, then @source=SOURCE, and {weight!r} is not a number"
        ) from None


def scalar(text: str) -> Any:
    """The value of ``--set key=value``, parsed as YAML; other text stays a string."""
    import yaml

    try:
        return parse_yaml(text, f"--set …={text}")
    except yaml.YAMLError:
        return text


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` pairs as a mapping. Raises InputError for anything else."""
    texts = [f"{key.replace('-', '_')}{equals}{value}" for key, equals, value in (s.partition("=") for s in settings)]
    return {key: scalar(value) for key, value in name_values(texts, "--set learning_rate=3e-4").items()}
