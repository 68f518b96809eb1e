"""Training a dictionary as a job of a cluster (Ray Train).

Every worker does what a process of ``torchrun`` does. If one dies, all begin again, from the last
checkpoint in the folder, which all of them must see, as they must see the store.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from modeldiff._files import PathLike
from modeldiff.cluster import connected, n_workers
from modeldiff.dictionaries.configs import DictionaryConfig, TrainConfig
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.sources import Source
from modeldiff.dictionaries.training import Trained, train
from modeldiff.distributed import World, backend, joined, launched
from modeldiff.distributed_training import By, train_distributed
from modeldiff.errors import StoreError, TrainingError
from modeldiff.store_following import followed
from modeldiff.store_places import is_address
from modeldiff.stores import ActivationStore

FAILURES = 3
"""How often a job begins again after a worker has died."""


@dataclass(frozen=True)
class TrainJob:
    """A training that any process can carry out: nothing in it but paths and numbers.

    Args:
        store: Folder of the rows.
        site: Which of its sites.
        out: Folder of the dictionary, and of its checkpoint (``checkpoint``).
        dictionary: Sizes and rules; ``d_model`` must be the store's.
        config: Of the training.
        by: What is divided among processes.
        follow: Minutes to wait for a harvest that is still writing the store; 0 takes a finished
            one alone.
        copy: Folder for what a harvest writes to an address.
    """

    store: str
    site: str
    out: str
    dictionary: DictionaryConfig
    config: TrainConfig
    by: By = "rows"
    follow: float = 0.0
    copy: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainJob":
        """Read what `to_json` wrote."""
        sizes, config = dict(values["dictionary"]), dict(values["config"])
        sizes |= {name: tuple(sizes[name]) for name in ("n_exclusive", "groups")}
        config["betas"] = tuple(config["betas"])
        return cls(**{
            **values, "dictionary": DictionaryConfig(**sizes), "config": TrainConfig(**config)
        })  # fmt: skip

    def absolute(self) -> "TrainJob":
        """The same, with folders that do not depend on where a process was started."""
        store, out, copy = (
            each if is_address(each) or not each else str(Path(each).absolute())
            for each in (self.store, self.out, self.copy)
        )  # fmt: skip
        return replace(self, store=store, out=out, copy=copy)

    def rows(self, cancel: Event | None = None) -> Source:
        """What is trained on."""
        if not self.follow:
            return ActivationStore.open(self.store).source(self.site)
        copy = self.copy or None
        return followed(self.store, self.site, copy=copy, minutes=self.follow, cancel=cancel)

    def run(self, world: World | None = None, **watched: Any) -> Trained:
        """Train, and save the dictionary in ``out``; every process of a world calls it.

        Args:
            world: The processes; None is this one alone.
            **watched: ``on_log``, ``progress`` and ``cancel`` of
                `modeldiff.dictionaries.training.train`.
        """
        source = self.rows(watched.get("cancel"))
        dictionary = Dictionary(self.dictionary, seed=self.config.seed)
        folder = Path(self.out) / "checkpoint"
        if world is None:
            made = train(dictionary.to(_device()), source, self.config, folder=folder, **watched)
        else:
            made = train_distributed(
                dictionary, source, self.config, world, by=self.by, folder=folder, **watched
            )
        if world is None or world.rank == 0:
            made.dictionary.save_to(self.out)
        return made


def run_here(job: TrainJob, **watched: Any) -> Trained:
    """Run a job in this process, or, under ``torchrun``, in all of those that it started.

    Raises:
        SetupError: If the processes do not meet.
        Cancelled, MismatchError, FileFormatError, TrainingError: As the training.
    """
    if not launched():
        return job.run(**watched)
    with joined() as world:
        return job.run(world, **watched)


def train_on(
    job: TrainJob, *, cluster: str = "auto", workers: int | None = None, storage: PathLike = ""
) -> Dictionary:
    """Run a job on a Ray cluster.

    Args:
        job: What to train; its folders must be seen by all machines.
        cluster: See `modeldiff.cluster.connected`.
        workers: How many; default one a GPU, or two.
        storage: Where Ray keeps its own notes about the job; default ``out/ray``.

    Returns:
        The dictionary, read from the job's folder.

    Raises:
        SetupError: If Ray is missing, or no cluster answers.
        TrainingError: If the job failed, and went on failing when it was begun again.
        StoreError: If it did not, but its dictionary is not where it should be.
    """
    with connected(cluster) as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = ray.cluster_resources().get("GPU", 0) > 0
        notes = Path(storage or Path(job.out) / "ray").absolute()
        trainer = TorchTrainer(
            _work,
            train_loop_config=job.absolute().to_json(),
            torch_config=TorchConfig(backend=backend(gpus)),
            scaling_config=ScalingConfig(num_workers=n_workers(ray, workers), use_gpu=gpus),
            run_config=RunConfig(
                name="modeldiff",
                storage_path=str(notes),
                failure_config=FailureConfig(max_failures=FAILURES),
            ),
        )
        try:
            trainer.fit()
        except (ray.exceptions.RayError, TrainingFailedError) as error:
            raise TrainingError(f"the training on the cluster failed: {error}") from error
    try:
        return Dictionary.load_from(job.out)
    except FileNotFoundError as error:
        raise StoreError(
            f"the workers have written no dictionary that is seen here in {job.out!r}: do all "
            "machines see this folder?"
        ) from error


def _work(values: dict[str, Any]) -> None:
    """What each worker does; Ray Train has made the process group, and chosen the GPU."""
    import torch
    from ray.train.torch import get_device

    device = get_device()
    if isinstance(device, torch.device) and device.type == "cuda":
        torch.cuda.set_device(device)
    with joined() as world:
        TrainJob.from_json(values).run(world)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
