"""A training run from its arguments to its export, in the order in which things happen."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import random_seed

from ssmvision.data import (
    ImageSource,
    SeededDataset,
    UserError,
    create_image_loader,
    find_bad_images,
    open_train_val,
    to_mode,
)
from ssmvision.data.check import describe_bad_images

from .checkpoint import load_checkpoint
from .distributed import Ranks, start_ranks, stop_ranks
from .export import export_folder
from .models import build_model, data_config
from .pictures import draw_predictions
from .run_folder import RunFolder
from .trainer import Trainer


def train(args: Namespace) -> dict[str, Any]:
    """Trains as `tools/train.py --help` describes and returns the best finished epoch.

    Raises:
        UserError: When something that the user can repair stops the run.
        Interrupted: When SIGTERM or SIGINT stopped it; the state is saved.
    """
    ranks = start_ranks(args.device)
    folder = None
    try:
        run_path = Path(args.output) / (args.experiment or args.model.replace("/", "_"))
        if ranks.is_first:
            folder = RunFolder(run_path, resume=bool(args.resume))
        train_source, val_source = open_train_val(
            args.data_dir,
            args.dataset,
            args.on_bad_sample,
            args.dataset_download,
            ranks.find_bad_images if ranks.distributed else find_bad_images,
        )
        _report_bad(train_source, val_source, ranks)
        args.num_classes = _num_classes(args.num_classes, train_source)
        trainer = _create_trainer(args, train_source, val_source, ranks, folder)
        _resume(trainer, args.resume, run_path)
        if folder:
            folder.write_args(args)
        trainer.run()
        if folder:
            _finish(trainer, folder, val_source)
        ranks.barrier()
        return trainer.best
    finally:
        if folder:
            folder.close()
        stop_ranks()


def _report_bad(train_source: ImageSource, val_source: ImageSource, ranks: Ranks) -> None:
    bad = train_source.bad + val_source.bad
    if bad and ranks.is_first:
        print(f"{len(bad)} unreadable images are left out:\n{describe_bad_images(bad)}", flush=True)


def _num_classes(asked: int | None, source: ImageSource) -> int:
    if source.class_names is None:
        if asked is None:
            raise UserError("The data set does not say how many classes it has; pass --num-classes.")
        return asked
    if asked not in (None, len(source.class_names)):
        raise UserError(f"--num-classes is {asked}, but the training data has {len(source.class_names)} classes.")
    return len(source.class_names)


def _create_trainer(
    args: Namespace, train_source: ImageSource, val_source: ImageSource, ranks: Ranks, folder: RunFolder | None
) -> Trainer:
    random_seed(args.seed)  # the same weights in every process
    model = build_model(args, args.num_classes)
    config = data_config(model, args)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    model.to(ranks.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    random_seed(args.seed, 1 + ranks.rank)  # dropout and Mixup of its own in every process
    shared = {
        "workers": args.workers,
        "seed": args.seed,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        "pin_memory": ranks.device.type == "cuda",
    }
    train_loader = create_image_loader(train_source, config, args.batch_size, augmentation(args), **shared)
    val_loader = create_image_loader(val_source, config, args.batch_size, **shared)
    identity = {
        "class_names": train_source.class_names,
        "fingerprint": train_source.fingerprint,
        "data_config": config,
    }
    if ranks.is_first:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{args.model}: {parameters / 1e6:.2f} M parameters, {args.num_classes} classes, input "
            f"{config['input_size']}; {len(train_source)} training and {len(val_source)} validation images; "
            f"{ranks.world_size} x {ranks.device}",
            flush=True,
        )
    return Trainer(args, model, train_loader, val_loader, ranks, folder, identity)


def augmentation(args: Namespace) -> dict[str, Any]:
    """Returns the arguments of timm's training transform."""
    return {
        "train_crop_mode": args.train_crop_mode,
        "scale": args.scale,
        "ratio": args.ratio,
        "hflip": args.hflip,
        "vflip": args.vflip,
        "color_jitter": args.color_jitter,
        "auto_augment": args.aa,
        "re_prob": args.reprob,
        "re_mode": args.remode,
    }


def _resume(trainer: Trainer, resume: str | None, run_path: Path) -> None:
    path = run_path / "last.pth" if resume == "auto" else resume
    if not path or (resume == "auto" and not Path(path).exists()):
        return  # `auto` starts a run that is not there yet, so that one command serves the first and every later start
    trainer.restore(load_checkpoint(path))
    if trainer.ranks.is_first:
        print(f"resumed {path} at epoch {trainer.epoch + 1}, batch {trainer.batch}", flush=True)


def _finish(trainer: Trainer, folder: RunFolder, val_source: ImageSource) -> None:
    """Exports the best weights, draws what they predict, and says how to load them."""
    state = load_checkpoint(folder.best)
    model = trainer.eval_model
    model.load_state_dict(state.get("state_dict_ema", state["state_dict"]))
    config = state["data_config"]
    export = export_folder(model, folder.export, config, state["class_names"])
    _draw_samples(trainer, val_source, folder.path / "predictions.png")
    best = trainer.best
    print(
        f"best epoch {best['epoch'] + 1}: top-1 {best['val_top1']:.2f} %, top-5 {best['val_top5']:.2f} %\n"
        f"results, curves and predictions: {folder.path}\n"
        f'load it: ssmvision.create_model("local-dir:{export}", pretrained=True)',
        flush=True,
    )


@torch.inference_mode()
def _draw_samples(trainer: Trainer, source: ImageSource, path: Path, count: int = 24) -> None:
    model, dataset = trainer.eval_model.eval(), cast(SeededDataset, trainer.val_loader.dataset)
    indices = sorted({int(i) for i in torch.linspace(0, len(source) - 1, count)})
    samples = [dataset[0, index] for index in indices]
    device = trainer.ranks.device
    predicted = torch.cat([model(image[None].to(device)).argmax(1).cpu() for image, _ in samples]).tolist()
    targets = [target for _, target in samples]
    names = source.class_names or [str(number) for number in range(trainer.args.num_classes)]
    wrong = [p != t for p, t in zip(predicted, targets, strict=True)]
    titles = [f"{names[p]}\n(is {names[t]})" if p != t else names[p] for p, t in zip(predicted, targets, strict=True)]
    images = [to_mode(source.dataset[index][0], dataset.image_mode) for index in indices]
    draw_predictions(images, titles, path, wrong)
