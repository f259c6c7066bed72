"""The rows of aliases: what each stands for, what it stood for before, how its versions do.

Every change is one transaction and leaves a line in the history. Going back restores what was
there before the change that is undone, so going back twice goes back further, never forth.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cluster.errors import ConfigError
from cluster.registry.database import Database
from cluster.registry.tables import Alias, AliasChange, AliasCount, AliasScore, Model
from serving import problems, rollout
from serving.config import require_name
from serving.problems import ApiError
from serving.rollout import Count, Evaluation, Guard, Rollout, Target

MAX_ALIASES = 1000
SPAN_S = 10
BY_ITSELF = "loray"
"""Who changes an alias that nobody changes."""
TUNED = "ft:"
"""How the names of tuned models begin, and no alias's."""
_WINDOW_S = 60
_KEPT_S = 86400
_MAX_REASON_CHARS = 512

Key = tuple[str, str, int, str, int]
"""Project, alias, revision, model, beginning of the span."""


class AliasBook:
    """The aliases of all projects. Its methods block: async code calls them in threads.

    Names that are served to everybody come as `fixed`; those of tuned models are in the registry.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def all(self) -> list[Rollout]:
        """Those of all projects."""
        with self._database.read() as session:
            return [_rollout(row) for row in session.scalars(select(Alias))]

    def list_(self, project: str) -> list[Rollout]:
        """Those of a project, by name."""
        rows = select(Alias).where(Alias.project == project).order_by(Alias.name)
        with self._database.read() as session:
            return [_rollout(row) for row in session.scalars(rows)]

    def get(self, project: str, name: str) -> Rollout:
        """One. Raises ApiError (404)."""
        with self._database.read() as session:
            return _rollout(_get(session, project, name))

    def find(self, project: str, name: str) -> Rollout | None:
        """One, if there is one."""
        with self._database.read() as session:
            row = _find(session, project, name)
            return None if row is None else _rollout(row)

    def changes(self, project: str, name: str, *, limit: int = 20) -> list[AliasChange]:
        """The last of them, the newest first."""
        rows = select(AliasChange).where(AliasChange.project == project, AliasChange.name == name)
        with self._database.read() as session:
            return [*session.scalars(rows.order_by(AliasChange.revision.desc()).limit(limit))]

    def put(
        self,
        project: str,
        name: str,
        targets: Sequence[Target],
        guard: Guard | None,
        *,
        by: str,
        fixed: Collection[str],
    ) -> Rollout:
        """Have a name stand for these versions from now on.

        Raises ConfigError for names and weights that cannot be, ApiError: 404 for a version that
        is not served, 409 where the name is a model's, somebody else changes it just now, or the
        guard would have it go back at once for a score that is there already.
        """
        require_name(name, "alias")
        if name in fixed or name.startswith(TUNED):
            raise ApiError(
                f"{name!r} is or may become the name of a model; choose another name for the alias",
                status=409,
                code="name_taken",
                param="name",
            )
        rollout.check(targets)
        try:
            with self._database.write() as session:
                row = _find(session, project, name, lock=True)
                if row is None:
                    self._require_room(session, project)
                _require_served(session, project, [target.model for target in targets], fixed)
                reason = "set"
                row = self._change(
                    session, row, project, name, _plain(targets), _plain_guard(guard), by, reason
                )
                found = _fallen(session, row, fixed)
                if found is not None:
                    raise ApiError(
                        f"{found[1]}; tell a new score (`loray alias evaluate`), or allow more",
                        status=409,
                        code="evaluation_failed",
                        param="targets",
                    )
                return _rollout(row)
        except IntegrityError:
            message = f"The alias {name!r} has just been changed by somebody else; look at it again"
            raise ApiError(message, status=409, code="conflict") from None

    def rollback(
        self,
        project: str,
        name: str,
        *,
        by: str,
        reason: str,
        fixed: Collection[str],
        revision: int | None = None,
    ) -> Rollout | None:
        """Restore what was there before; changes whose versions are not served any more are
        passed over. revision: do so only where the alias is still at it, else return None.

        Raises ApiError: 404 for an alias that there is not, 409 where there is nothing before.
        """
        with self._database.write() as session:
            row = _get(session, project, name, lock=True)
            if revision is not None and row.revision != revision:
                return None
            before = next(_befores(session, row, fixed), None)
            if before is None:
                raise ApiError(
                    f"The alias {name!r} stood for nothing before that is still served; set it",
                    status=409,
                    code="nothing_before",
                )
            return _rollout(self._restore(session, row, before, by, reason))

    def score(
        self,
        project: str,
        name: str,
        model: str,
        metric: str,
        value: float,
        *,
        by: str,
        fixed: Collection[str],
    ) -> Rollout:
        """Note what a model is worth, in place of what was noted before, and go back where that is
        too little; what the alias stands for then. The same score twice changes nothing more.

        A model may be told of before an alias stands for it. Raises ConfigError for a value that
        is no number, ApiError: 400 for a metric that no guard of the alias has named, 404 for an
        alias or a model that there is not.
        """
        if not math.isfinite(value):
            raise ConfigError(f"value is {value}; a score is a finite number")
        with self._database.write() as session:
            row = _get(session, project, name, lock=True)
            _require_metric(session, row, metric)
            _require_served(session, project, [model], fixed, param="model")
            session.merge(
                AliasScore(
                    project=project,
                    name=name,
                    metric=metric,
                    model=model,
                    value=value,
                    by=by,
                    created_at=self._clock(),
                )
            )
            while (found := _fallen(session, row, fixed)) is not None:
                before, why = found
                self._restore(session, row, before, BY_ITSELF, why)
            return _rollout(row)

    def scores(self, one: Rollout) -> dict[str, float]:
        """What models were last found to be worth, by the metric of the alias's guard."""
        evaluation = one.guard.evaluation if one.guard else None
        if evaluation is None:
            return {}
        with self._database.read() as session:
            return _scores(session, one.project, one.name, evaluation.metric)

    def remove(self, project: str, name: str, *, by: str) -> None:
        """Have a name stand for nothing. Raises ApiError (404)."""
        with self._database.write() as session:
            row = _get(session, project, name, lock=True)
            self._change(session, row, project, name, [], None, by, "removed")
            session.execute(
                delete(AliasScore).where(AliasScore.project == project, AliasScore.name == name)
            )
            session.delete(row)

    def require_free(self, name: str) -> None:
        """Raises ApiError (409) for a name that an alias of any project has."""
        with self._database.read() as session:
            if session.scalar(select(Alias.name).where(Alias.name == name).limit(1)) is not None:
                raise ApiError(
                    f"{name!r} is the name of an alias; remove that first, or choose another name",
                    status=409,
                    code="name_taken",
                    param="name",
                )

    def require_unused(self, model: str, *, project: str | None) -> None:
        """Raises ApiError (409) for a model that an alias stands for.

        project: whose model it is; None: everybody's.
        """
        for one in self.all() if project is None else self.list_(project):
            if any(target.model == model for target in one.targets):
                raise ApiError(
                    "An alias stands for this model; have it stand for others first.",
                    status=409,
                    code="in_use",
                    param="model",
                )

    def add(self, replica: str, counts: Mapping[Key, Count]) -> None:
        """Add to what a replica has counted; it alone writes its rows."""
        with self._database.write() as session:
            for (project, name, revision, model, span), count in sorted(counts.items()):
                key = {
                    "project": project, "name": name, "revision": revision, "model": model,
                    "replica": replica, "span": span,
                }  # fmt: skip
                row = session.get(AliasCount, key)
                if row is None:
                    row = AliasCount(**key, requests=0, errors=0, seconds=0.0)
                    session.add(row)
                row.requests += count.requests
                row.errors += count.errors
                row.seconds += count.seconds

    def forget(self) -> None:
        """Drop counts that are older than a day."""
        with self._database.write() as session:
            session.execute(delete(AliasCount).where(AliasCount.span < self._clock() - _KEPT_S))

    def last_minute(self, one: Rollout) -> dict[str, Count]:
        """What became of the requests of each version, on all replicas, at this revision."""
        wanted = select(
            AliasCount.model,
            func.sum(AliasCount.requests),
            func.sum(AliasCount.errors),
            func.sum(AliasCount.seconds),
        ).where(
            AliasCount.project == one.project,
            AliasCount.name == one.name,
            AliasCount.revision == one.revision,
            AliasCount.span > self._clock() - _WINDOW_S,
        )
        with self._database.read() as session:
            return {
                model: Count(requests=int(requests), errors=int(errors), seconds=float(seconds))
                for model, requests, errors, seconds in session.execute(
                    wanted.group_by(AliasCount.model)
                )
            }

    def _require_room(self, session: Session, project: str) -> None:
        number = select(func.count()).select_from(Alias).where(Alias.project == project)
        if (session.scalar(number) or 0) >= MAX_ALIASES:
            raise ConfigError(f"there are {MAX_ALIASES} aliases, as many as may be; remove one")

    def _change(
        self,
        session: Session,
        row: Alias | None,
        project: str,
        name: str,
        targets: list[Any],
        guard: dict[str, Any] | None,
        by: str,
        reason: str,
        *,
        restored: int | None = None,
    ) -> Alias:
        now = self._clock()
        last = select(func.max(AliasChange.revision)).where(
            AliasChange.project == project, AliasChange.name == name
        )
        revision = (session.scalar(last) or 0) + 1  # counts of a removed namesake are not ours
        if row is None:
            row = Alias(project=project, name=name)
            session.add(row)
        row.revision, row.targets, row.guard, row.updated_at = revision, targets, guard, now
        session.add(
            AliasChange(
                project=project,
                name=name,
                revision=revision,
                restored=restored,
                targets=targets,
                guard=guard,
                reason=reason[:_MAX_REASON_CHARS],
                by=by,
                created_at=now,
            )
        )
        session.flush()
        return row

    def _restore(
        self, session: Session, row: Alias, before: AliasChange, by: str, reason: str
    ) -> Alias:
        return self._change(
            session, row, row.project, row.name, before.targets, before.guard, by, reason,
            restored=_origin(before),
        )  # fmt: skip


def _find(session: Session, project: str, name: str, *, lock: bool = False) -> Alias | None:
    if "\0" in name:  # PostgreSQL takes none
        return None
    rows = select(Alias).where(Alias.project == project, Alias.name == name)
    return session.scalar(rows.with_for_update() if lock else rows)


def _get(session: Session, project: str, name: str, *, lock: bool = False) -> Alias:
    row = _find(session, project, name, lock=lock)
    if row is None:
        raise problems.not_found("alias", name)
    return row


def _origin(change: AliasChange) -> int:
    return change.revision if change.restored is None else change.restored


def _befores(session: Session, row: Alias, fixed: Collection[str]) -> Iterator[AliasChange]:
    """The changes to whose states an alias goes back, one after the other."""
    changes = session.scalars(
        select(AliasChange)
        .where(AliasChange.project == row.project, AliasChange.name == row.name)
        .order_by(AliasChange.revision.desc())
    ).all()
    by_revision = {change.revision: change for change in changes}
    current = by_revision.get(row.revision)
    while current is not None:
        current = by_revision.get(_origin(current) - 1)
        if current is None or not current.targets:
            return
        names = [target["model"] for target in current.targets]
        if not _missing(session, row.project, names, fixed):
            yield current


def _fallen(session: Session, row: Alias, fixed: Collection[str]) -> tuple[AliasChange, str] | None:
    """The change to whose state an alias has to go back for a score, and why."""
    guard = _rollout(row).guard
    if guard is None or guard.evaluation is None:
        return None
    scores = _scores(session, row.project, row.name, guard.evaluation.metric)
    befores = [*_befores(session, row, fixed)] if scores else []
    states = [_targets(change.targets) for change in (row, *befores)]
    found = rollout.fallen(guard.evaluation, states, scores)
    return None if found is None else (befores[found[0] - 1], found[1])


def _scores(session: Session, project: str, name: str, metric: str) -> dict[str, float]:
    rows = select(AliasScore.model, AliasScore.value).where(
        AliasScore.project == project, AliasScore.name == name, AliasScore.metric == metric
    )
    return dict(iter(session.execute(rows)))


def _require_metric(session: Session, row: Alias, metric: str) -> None:
    """Of any of its guards: a version that was left for its score may be told of again."""
    guards = session.scalars(
        select(AliasChange.guard).where(
            AliasChange.project == row.project, AliasChange.name == row.name
        )
    )
    evaluations = [_guard(guard).evaluation for guard in guards if guard]
    known = sorted({one.metric for one in evaluations if one is not None})
    if metric not in known:
        named = f"its guards name {', '.join(known)}" if known else "no guard of it names one"
        raise ApiError(
            f"The alias {row.name!r} goes by no evaluation {metric[:200]!r}: {named}; see "
            "`loray alias set --guard-metric`",
            status=400,
            code="invalid_value",
            param="metric",
        )


def _missing(
    session: Session, project: str, names: Sequence[str], fixed: Collection[str]
) -> list[str]:
    tuned = [name for name in names if name not in fixed]
    found = select(Model.name).where(
        Model.project == project, Model.name.in_(tuned), Model.deleted_at.is_(None)
    )
    known = set(session.scalars(found)) if tuned else set[str]()
    return [name for name in tuned if name not in known]


def _require_served(
    session: Session,
    project: str,
    names: Sequence[str],
    fixed: Collection[str],
    *,
    param: str = "targets",
) -> None:
    if any("\0" in name for name in names):
        raise problems.model_not_found("\\0")
    missing = _missing(session, project, names, fixed)
    if not missing:
        return
    if _find(session, project, missing[0]) is not None:
        raise ApiError(
            f"{missing[0]!r} is an alias; an alias stands for models only: name one",
            status=400,
            code="invalid_value",
            param=param,
        )
    raise problems.model_not_found(missing[0])


def _rollout(row: Alias) -> Rollout:
    return Rollout(
        project=row.project,
        name=row.name,
        revision=row.revision,
        targets=_targets(row.targets),
        guard=_guard(row.guard) if row.guard else None,
        changed_at=row.updated_at,
    )


def _targets(rows: Sequence[Any]) -> tuple[Target, ...]:
    return tuple(Target(**row) for row in rows)


def _guard(row: dict[str, Any]) -> Guard:
    evaluation = row.get("evaluation")
    return Guard(**{**row, "evaluation": Evaluation(**evaluation) if evaluation else None})


def _plain(targets: Sequence[Target]) -> list[Any]:
    return [asdict(target) for target in targets]


def _plain_guard(guard: Guard | None) -> dict[str, Any] | None:
    return None if guard is None else asdict(guard)
