"""A teacher whose answers are kept on disk, and who is opened when something is asked for the first time.

    keys of a micro-batch ─► all there? ──────────────────────────────────────► read ─► states
                                  └─ no ─► the teacher ─► top k ─► rounded, kept ─┘

What was computed just now is read as it was stored, so no number of a run depends on what was there before.
On a miss the whole micro-batch is computed: another number of samples has other roundings.
"""

import logging
from collections.abc import Callable

import torch

from data_handler import Batch
from wrinklefree.objectives.base import Needs
from wrinklefree.teachers.base import Teacher
from wrinklefree.teachers.sparse import SparseTeacherStates, UndecidedTeacher, kept_mass, most_probable
from wrinklefree.teachers.store import TeacherStore, keys_of

logger = logging.getLogger(__name__)


class CachedTeacher(Teacher):
    """Reads a store, and fills it."""

    knows_inside = False

    def __init__(self, store: TeacherStore, open_teacher: Callable[[], Teacher]) -> None:
        self.store = store
        self.num_hits = self.num_misses = 0
        self._open_teacher = open_teacher
        self._opened: Teacher | None = None
        self._device: torch.device | str = "cpu"
        self._mass, self._num_masses = 0.0, 0
        self._mass_of_all, self._num_of_all = 0.0, 0
        self._was_empty = len(store) == 0

    def answer(self, batch: Batch, needs: Needs, *, excluded: int | None) -> SparseTeacherStates:
        identity = self.store.identity
        keys = keys_of(batch)
        if all(key in self.store for key in keys):
            self.num_hits += len(keys)
        else:
            self.num_misses += len(keys)
            taught = self.teacher.answer(batch, Needs(teacher_logits=True), excluded=excluded)
            self.store.add(keys, *most_probable(taught, batch, identity.top_k))
        ids_BTK, log_probs_BTK = self.store.read(keys)
        self._weigh(log_probs_BTK)
        states = SparseTeacherStates(ids=ids_BTK, log_probs=log_probs_BTK, vocab_size=identity.vocab_size)
        return states.to(batch.labels.device)

    @property
    def teacher(self) -> Teacher:
        """Opened when somebody wants it."""
        if self._opened is None:
            self._opened = self._open_teacher()
            self._opened.to(self._device)
        return self._opened

    def take_numbers(self) -> dict[str, float]:
        """The share of the probability that the top k hold, on this rank."""
        if not self._num_masses:
            return {}
        mean = self._mass / self._num_masses
        self._mass, self._num_masses = 0.0, 0
        return {"teacher_mass": mean}

    def rehearsing(self) -> Teacher:
        """A cache with something in it is taken for complete."""
        if self._was_empty:
            return self.teacher.rehearsing()
        return UndecidedTeacher(self.store.identity.vocab_size, self.store.identity.top_k)

    def to(self, device: torch.device | str) -> None:
        self._device = device
        if self._opened is not None:
            self._opened.to(device)

    def flush(self) -> None:
        self.store.flush()

    def close(self) -> None:
        self.flush()
        if self._num_of_all:
            logger.info(
                "teacher cache: %d samples were there, %d were asked for; the top %d hold %.2f %% of the "
                "probability",
                self.num_hits,
                self.num_misses,
                self.store.identity.top_k,
                100 * self._mass_of_all / self._num_of_all,
            )
            self._num_of_all = 0
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _weigh(self, log_probs_BTK: torch.Tensor) -> None:
        mass_BT = kept_mass(log_probs_BTK)
        mass, number = float(mass_BT.nansum()), int(mass_BT.isfinite().sum())
        self._mass, self._num_masses = self._mass + mass, self._num_masses + number
        self._mass_of_all, self._num_of_all = self._mass_of_all + mass, self._num_of_all + number
