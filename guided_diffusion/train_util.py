"""The training loop: steps whose randomness is keyed by (seed, step), moving averages, logs, checkpoints, resuming.

Shapes: N images of a step on all ranks together, n of them in a microbatch, C channels, H W space, K classes. What an
image draws depends on its place among these N, so that neither ranks nor microbatches change what is learned. A number
of updates counts from the beginning of the run, resumed parts included.
"""

from __future__ import annotations

import copy as copy
import functools as functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import blobfile as bf  # noqa: F401 - what a star import of the original's gives
import torch as th
import torch.distributed as dist  # noqa: F401
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: F401

from . import dist_util, logger
from .fp16_util import INITIAL_LOG_LOSS_SCALE as INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from .networks.compiling import eagerly, evaluating
from .nn import traits_of, update_ema
from .resample import LossAwareSampler, ScheduleSampler, UniformSampler as UniformSampler, create_named_schedule_sampler
from .runtime import files
from .runtime.errors import refuse
from .runtime.options import parse_microbatch, parse_profiles, parse_rates
from .runtime.seeds import seeded
from .training import batches, checkpoints
from .training.averages import PowerAverages
from .training.bad_steps import BadSteps
from .training.batches import Cond, RollingValidation, Supply, Validation
from .training.checkpoints import Checkpoint
from .training.gradients import AdamW, AveragingTrainer
from .training.interruption import Failures, Interruption
from .training.meter import Meter, join, log_loss_dict as log_loss_dict
from .training.noise import TRAINING, VALIDATION, Draw, LabelDropout, draw_for_training, draw_for_validation
from .training.saving import (
    RunState,
    Saver,
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    load_weights,
    parse_resume_step_from_filename,
)
from .training.settings import Hook as Hook, Settings


class TrainLoop:
    """Trains a diffusion model; subclasses override `compute_losses` to train something else.

    :param data: endless iterator of (images [n, C, H, W] in [-1, 1], or uint8, model keywords). One with state_dict()
        and load_state_dict() goes on where it stopped when a run is resumed.
    :param batch_size: images per step and rank; `microbatch` of them at a time, -1: all, "auto": as many as the memory
        holds, by halves.
    :param lr: None takes the one in the optimizer file that is resumed from.
    :param ema_rate: one rate, or several as text separated by commas; '' for none.
    :param resume_checkpoint: any file of a run's checkpoints, or its folder; '' starts anew.
    :param lr_anneal_steps: updates over which the learning rate falls to 0, where the run stops; 0: constant.
    :param settings: the fields of `Settings`.
    """

    loss_prefix, validation_of = "", Validation
    extra: Mapping[str, Any] = {}  # what checkpoints also hold, by name: objects with (load_)state_dict()

    def __init__(
        self,
        *,
        model: th.nn.Module,
        diffusion: Any,
        data: Any,
        batch_size: int,
        microbatch: int | str,
        lr: float | None,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | str | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        **settings: Any,
    ) -> None:
        self.settings = options = Settings(**settings)
        self.model, self.diffusion, self.data, self.batch_size = model, diffusion, data, batch_size
        self.global_batch = batch_size * dist_util.world_size()
        self.auto_microbatch, size = microbatch == "auto", parse_microbatch(str(microbatch))
        self.microbatch = size if isinstance(size, int) and size > 0 else batch_size
        self.lr, self.lr_anneal_steps, self.weight_decay = lr, lr_anneal_steps, weight_decay
        self.ema_rate, self.seed, self.hooks = parse_rates(ema_rate), options.seed, options.hooks
        self.log_interval, self.save_interval, self.val_interval = log_interval, save_interval, options.val_interval
        kept = {"keep_last": options.keep_last, "keep_every": options.keep_every}
        self.saver = Saver(asynchronous=options.async_save, kind=options.checkpoint_format, **kept)
        self.validation = self.validation_of(options.val_data, options.val_batches)
        chosen: Any = schedule_sampler or "uniform"
        self.schedule_sampler = create_named_schedule_sampler(chosen, diffusion) if isinstance(chosen, str) else chosen
        self.resume_checkpoint = find_resume_checkpoint() or resume_checkpoint
        traits = traits_of(model)
        self.label_dropout = LabelDropout(options.class_dropout, traits.null_label, traits.null_vector)
        self.step, self.resume_step = 0, 0
        self.use_fp16, self.fp16_scale_growth, self.sync_cuda = use_fp16, fp16_scale_growth, th.cuda.is_available()
        files, self.mp_trainer = self._load_and_sync_parameters(), self._make_trainer()
        self._set_up(files)

    def _make_trainer(self) -> MixedPrecisionTrainer:
        kind: type[MixedPrecisionTrainer] = AveragingTrainer if dist_util.world_size() > 1 else MixedPrecisionTrainer
        if self.settings.fsdp:
            refuse((self.auto_microbatch, "microbatch auto does not go with fsdp: give a number of images"))
            from .training.sharding import ShardedTrainer as kind
        return kind(
            model=self.model,
            use_fp16=self.use_fp16,
            fp16_scale_growth=self.fp16_scale_growth,
            initial_lg_loss_scale=self.settings.initial_lg_loss_scale,
            precision=self.settings.precision,
            grad_clip=self.settings.grad_clip,
        )

    def _set_up(self, files: Checkpoint | None) -> None:
        """Make the optimizer and the moving averages of the masters, and resume from `files`."""
        self.device = next(self.model.parameters()).device
        # Gradients are averaged in fp32 by the trainer: nothing wraps the model, and forks that ask find it so.
        self.use_ddp, self.ddp_model = False, self.model
        masters, fused = self.mp_trainer.master_params, self.device.type in ("cpu", "cuda")
        self.opt = AdamW(masters, lr=self.lr or 0.0, weight_decay=self.weight_decay, fused=fused)
        self.ema_params = [[param.detach().clone() for param in masters] for _ in self.ema_rate]
        self.powers = PowerAverages(parse_profiles(self.settings.ema_profiles), self.mp_trainer)
        if files is not None or self.resume_step:  # the step alone: of a subclass that has loaded the weights itself
            self._resume(files or self._chosen() or Checkpoint(self.resume_step))
        refuse((self.lr is None, "lr is None, and there is no optimizer file to take it from: give a learning rate"))
        self._losses_at: tuple[th.Tensor, th.Tensor] | None = None
        self.meter = Meter(self.global_batch, done=self.updates, total=self.limit, progress=self.settings.progress)
        self.supply, self._saved = Supply(self.data, self.meter), self.updates
        self.bad_steps = BadSteps(self.settings.max_bad_steps, self.mp_trainer, self.data, self.meter)
        self.failures, self._unchanged = Failures(), False

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self.step + self.resume_step

    @property
    def limit(self) -> int:
        """Updates after which the run is done; 0 if it never is."""
        return min((steps for steps in (self.settings.max_steps, self.lr_anneal_steps) if steps), default=0)

    @property
    def done(self) -> bool:
        """Whether the run has made all its updates."""
        return bool(self.limit) and self.updates >= self.limit

    def _chosen(self) -> Checkpoint | None:
        files, faults = checkpoints.choose(self.resume_checkpoint)
        for line in faults:
            logger.warn(line)
        return files

    def _load_and_sync_parameters(self) -> Checkpoint | None:
        """Load the weights to go on from, on every rank; without any, every rank takes those of rank 0."""
        files = self._chosen()
        if files is not None:
            files.step = parse_resume_step_from_filename(files.model) or files.step
            load_weights(self.model, files, (self.settings.config or {}).get("flags", {}))
        dist_util.sync_params(self.model.parameters())
        return files

    def _resume(self, files: Checkpoint) -> None:
        """Take up everything of a checkpoint but the weights."""
        self._files, self._resumed, self.saver.source = files, RunState(self), files.model
        step = self._resumed.open(files)
        self.resume_step = self.resume_step or step
        self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
        self.powers.load(lambda width: self._resumed.average(f"power_{width}", files.powers.get(str(width))))
        self._load_optimizer_state()
        self._resumed.close(self.resume_step)

    def _load_ema_parameters(self, rate: float) -> list[th.Tensor]:
        return self._resumed.average(str(rate), find_ema_checkpoint(self._files.model, self.resume_step, rate))

    def _load_optimizer_state(self) -> None:
        self._resumed.load_optimizer(self._files.opt)

    def save(self) -> None:
        """Write the checkpoint of the updates made so far; every rank calls it, rank 0 writes."""
        self._saved = self.updates
        self.saver.save(RunState(self), get_blob_logdir(), self.updates)

    def run_loop(self) -> None:
        """Train until the limit, for ever without one; SIGINT, SIGTERM and SIGUSR1 end it after a step, saved.

        So does an error of the data, the log, a hook or the disk, which is raised when everything is saved.
        """
        if self.resume_step:
            logger.rewind(self.resume_step)
        self._announce()
        interruption, stopped = Interruption(), False
        with self.meter, interruption, self.saver:
            while not (self.done or stopped) and self._make_step():
                self._after_step()
                tested = bool(os.environ.get("DIFFUSION_TRAINING_TEST")) and self._saved == self.updates
                stopped = tested or interruption.requested(self.updates)
            for work in (self._dump, self.save) if self._saved != self.updates else (self._dump,):
                self.failures.keep(work)
        self.failures.end()
        interruption.end()

    def _announce(self) -> None:
        """Log what will be trained and how, and save the config."""
        settings, trainer, start = self.settings, self.mp_trainer, self.settings.ema_start
        trained = sum(param.numel() for param in trainer.trained(trainer.model_params))
        logger.log(
            f"training {trained:,} parameters{', split over all ranks,' if settings.fsdp else ''} in "
            f"{trainer.precision} on {self.device}: global batch {self.global_batch}, in microbatches of "
            f"{self.microbatch}, step {self.updates} to {self.limit or 'no end'}, lr {self.lr:g}, EMA "
            f"{self.ema_rate or 'none'}{', warmed up' * settings.ema_warmup}{f', from step {start}' * (start > 0)}"
        )
        if not hasattr(self.data, "state_dict"):
            logger.log("the data iterator has no state_dict(): a resumed run will not know its position")
        for rate in () if settings.ema_warmup or start else self.ema_rate:
            if rate < 1 and self.limit and checkpoints.is_young(rate, self.limit):
                logger.warn(
                    f"EMA {rate} averages over about {1 / (1 - rate):.0f} updates and the run has {self.limit}: it "
                    "will still resemble the first weights; choose a smaller ema_rate, or ema_warmup True"
                )
        if self.done:
            logger.log(f"nothing to do: {self.updates} updates are made and the limit is {self.limit}")
        if settings.config is not None and dist_util.rank() == 0:
            files.write_json(files.join(get_blob_logdir(), checkpoints.CONFIG), settings.config)

    def _make_step(self) -> bool:
        """Make the coming update; False, and everything is as before, where a rank has failed."""
        failures, batch = self.failures, None
        if not (failures.error or failures.sentences):
            batch = failures.keep(self.supply.take, self.updates)
        if failures.known:
            return False
        if not self.supply.begun:
            failures.end()  # there is nothing to save
        scale, self._unchanged = self.mp_trainer.state_dict(), False
        try:
            self.run_step(*(batch or self.supply.spoiled()))
        except Exception as error:
            if dist_util.world_size() > 1 or not self._unchanged:
                raise
            failures.add(error)
        if failures.known:
            self.mp_trainer.load_state_dict(scale)
            if batch:
                self.supply.give_back()
            return False
        failures.end()  # of a subclass whose run_step tells no other rank
        self.step += 1
        self.meter.step_done()
        return True

    def run_step(self, batch: th.Tensor, cond: Cond) -> None:
        """One update from a batch of this rank."""
        self._anneal_lr()
        self._backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self.bad_steps.in_a_row = 0
            self._update_ema()
            if isinstance(self.schedule_sampler, LossAwareSampler) and self._losses_at is not None:
                self.schedule_sampler.update_with_local_losses(*self._losses_at)
            self._losses_at = None
        elif self.failures.tell():
            self.meter.drop_losses()
            return
        elif self.bad_steps.skipped(self.updates + 1, cond, self._losses_at):
            self.saver.wait()
            dist_util.barrier()  # no rank ends before rank 0 has written
            raise self.bad_steps.error(self.updates + 1, get_blob_logdir(), self.resume_checkpoint)
        self.log_step()

    def _backward(self, batch: th.Tensor, cond: Cond) -> None:
        """`forward_backward` with generators of its own, in parts that the memory holds if these are automatic."""
        self._unchanged = True  # by an error in here
        # Dropout draws from the global generator: keyed too, and another mask on every rank.
        key = self.updates * dist_util.world_size() + dist_util.rank()

        def attempt(size: int) -> None:
            self.microbatch = size
            with seeded(self.seed + TRAINING, key, self.device):
                self.forward_backward(batch, cond)

        forget = self.mp_trainer.zero_grad if self.auto_microbatch else None
        batches.halve_until_it_fits(attempt, self.microbatch, forget)
        self._unchanged = False

    def forward_backward(self, batch: th.Tensor, cond: Cond) -> None:
        """Gradients of the mean loss of a batch, microbatch by microbatch."""
        self.mp_trainer.zero_grad()
        draw, cond = self._draw(batch, self.updates), self.label_dropout(cond, self.seed, self.updates)
        rows, done = [], 0
        for images, keywords, part in batches.microbatches(batch, cond, draw, self.microbatch):
            losses, done = self.compute_losses(images, keywords, part), done + len(images)
            mean = (losses["loss"] * part.weights).mean()
            # A rank that may yet begin anew must not have sent anything.
            last = done == len(batch) and not self.auto_microbatch
            self.mp_trainer.backward(mean * (len(images) / len(batch)), last=last)
            rows.append({name: value.detach() for name, value in losses.items()})
        losses = join(rows)
        self._losses_at = draw.t, losses["loss"]
        self.meter.add_losses(draw.t, {name: value * draw.weights for name, value in losses.items()})

    def _draw(self, batch: th.Tensor, index: int, *, validation: bool = False, counted: int | None = None) -> Draw:
        """This rank's part of what is drawn for a global batch."""
        if validation:
            return draw_for_validation(batch, self.diffusion.num_timesteps, self.seed, index, self.device, counted)
        return draw_for_training(batch, self.schedule_sampler, self.seed, index, self.device)

    def compute_losses(
        self, batch: th.Tensor, cond: Cond, draw: Draw, model: th.nn.Module | None = None
    ) -> Mapping[str, th.Tensor]:
        """Loss terms [n] of a microbatch; the one called "loss" is minimised, all are logged.

        :param model: measured instead of the one in training.
        """
        losses: Mapping[str, th.Tensor] = self.diffusion.training_losses(
            self.ddp_model if model is None else model, batch, draw.t, model_kwargs=dict(cond), noise=draw.noise
        )
        return losses

    def _update_ema(self) -> None:
        n = self.updates - self.settings.ema_start
        most = 0.0 if n < 0 else (1 + n) / (10 + n) if self.settings.ema_warmup else 1.0
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(self.mp_trainer.trained(params), self.mp_trainer.trained(), rate=min(rate, most))
        self.powers.update(self.updates + 1)

    def _anneal_lr(self) -> None:
        """Set the learning rate of the coming update: a linear rise over the warm-up, a linear fall to the end."""
        assert self.lr is not None
        rising = self.settings.warmup_steps
        factor = min(1.0, (self.updates + 1) / rising) if rising else 1.0
        if self.lr_anneal_steps:
            factor *= max(0.0, 1 - self.updates / self.lr_anneal_steps)
        for group in self.opt.param_groups:
            group["lr"] = self.lr * factor

    def log_step(self) -> None:
        """Log the counters of the update just made."""
        logger.logkv("step", self.updates + 1)
        logger.logkv("samples", (self.updates + 1) * self.global_batch)
        logger.logkv("lr", self.opt.param_groups[0]["lr"])

    def _after_step(self) -> None:
        """Validate, call hooks, log and save, each every so many updates."""
        keep = self.failures.keep
        with self.meter.paused():
            if self.validation.data is not None and self._is_due(self.val_interval):
                keep(self.validate, together=True)
            for hook in self.hooks:
                if self._is_due(hook.interval):
                    keep(self._look, hook, together=hook.on_all_ranks)
        if self._is_due(self.log_interval):
            keep(self._dump)
        if self._is_due(self.save_interval):
            with self.meter.paused(saving=True):
                keep(self.save)
        keep(self.saver.poll)

    def _dump(self) -> None:
        self.meter.dump(lambda t, losses: log_loss_dict(self.diffusion, t, losses), self.loss_prefix)

    def _look(self, hook: Hook) -> None:
        looks = hook.on_all_ranks or dist_util.rank() == 0
        if looks or self.settings.fsdp:  # then all ranks must give their part of the model
            with self.evaluation_model() as model:
                if looks:
                    hook.look(model, self.updates)

    def _is_due(self, interval: int) -> bool:
        return interval > 0 and self.updates % interval == 0

    @contextmanager
    def evaluation_model(self) -> Iterator[th.nn.Module]:
        """The model that is measured and sampled: a copy with the slowest moving average, else the model itself.

        Inside the block there are no gradients, and the generators of the training are left alone.
        """
        slowest = self.ema_params[self.ema_rate.index(max(self.ema_rate))] if self.ema_params else None
        model = self.mp_trainer.plain_model(slowest)
        with th.no_grad(), eagerly(model), evaluating(model), seeded(self.seed + VALIDATION, self.updates, self.device):
            yield model

    def validate(self) -> None:
        """Log the losses of the validation images as val_NAME; every rank calls it."""
        parts = self.failures.keep(self.validation.parts, self.updates)
        if self.failures.tell() or parts is None:
            return
        with self.evaluation_model() as model:
            values = batches.measured(parts, self._draw, self.compute_losses, model, self.microbatch)
        log_loss_dict(self.diffusion, values.pop("t"), {f"val_{name}": value for name, value in values.items()})


class ClassifierTrainLoop(TrainLoop):
    """Trains a classifier of noisy images: model(x_t, timesteps) returns logits [n, K], cond holds labels y [n].

    Logs train_loss, train_acc@1, train_acc@5 (at most K) and, from the next batch of `val_data` each time, val_ ones;
    with each checkpoint it measures all of an `ImageStream`, as `judge` says.

    :param noised: False trains on clean images, at t = 0.
    """

    loss_prefix, validation_of = "train_", RollingValidation

    def __init__(self, *, noised: bool = True, **keywords: Any) -> None:
        self.noised = noised
        super().__init__(**keywords)
        if self.resume_step and hasattr(self.validation.data, "global_batch"):
            self.validation.data.load_state_dict({"batches": self.resume_step // max(1, self.val_interval)})

    def _after_step(self) -> None:
        if hasattr(self.validation.data, "global_batch") and (self.done or self._is_due(self.save_interval)):
            from .training.confusion import judge

            with self.meter.paused():
                self.failures.keep(judge, self, get_blob_logdir(), together=True)
        super()._after_step()

    def _draw(self, batch: th.Tensor, index: int, *, validation: bool = False, counted: int | None = None) -> Draw:
        draw = super()._draw(batch, index, validation=validation, counted=counted)
        return draw if self.noised else Draw(th.zeros_like(draw.t), th.ones_like(draw.weights), draw.noise)

    def compute_losses(
        self, batch: th.Tensor, cond: Cond, draw: Draw, model: th.nn.Module | None = None
    ) -> dict[str, th.Tensor]:
        """Cross-entropy [n], and 1 or 0 for each image whose label is among the first 1 and 5 guesses."""
        noisy = self.diffusion.q_sample(batch, draw.t, draw.noise) if self.noised else batch
        network = self.ddp_model if model is None else model
        logits = network(noisy, timesteps=self.diffusion.timesteps(draw.t, noisy))
        labels = cond["y"]
        ranks = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        accuracies = {f"acc@{k}": ranks[:, :k].any(dim=1).float() for k in (1, ranks.shape[1])}
        return {"loss": F.cross_entropy(logits, labels, reduction="none"), **accuracies}
