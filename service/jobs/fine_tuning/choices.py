"""What a client chooses from for a job: the server's teachers, and the presets and methods of `distill run`."""

from functools import cache

from distill import methods, presets
from service.errors import InvalidRequest, NotFound, quoted
from service.jobs.fine_tuning.commands import find_teacher
from service.jobs.fine_tuning.options import KEYS, DistillationOptions
from service.jobs.schemas import JobChoices, MethodChoice, PresetChoice, TeacherChoice
from service.settings import Settings

MIN_STEPS = 200  # after so many, no method on the toy dataset had converged; docs/results.md, "Methods with few images"


def job_choices(settings: Settings) -> JobChoices:
    """Return the choices. Teachers whose files are not on this server are marked."""
    teachers = settings.jobs.teachers
    return JobChoices(
        teachers=[TeacherChoice(name=name, available=_is_available(settings, name)) for name in teachers],
        presets=[
            each.model_copy(update={"teachers": [name for name, given in teachers.items() if given == source]})
            for each, source in _presets()
        ],
        methods=[MethodChoice(name=name, description=methods.summary(name)) for name in methods.names()],
        max_images=settings.jobs.max_images_per_job,
        max_seconds=settings.jobs.max_seconds_per_job,
        min_steps=MIN_STEPS,
    )


def check_names(options: DistillationOptions) -> None:
    """Raise InvalidRequest for a preset or method that `distill run` does not have."""
    chosen = (("preset", options.preset, presets.names()), ("method", options.method, methods.names()))
    for kind, name, known in chosen:
        if name is not None and name not in known:
            message = f"distillation.{kind}: there is no {kind} {quoted(name)}; there are {', '.join(known)}"
            raise InvalidRequest(message, f"distillation.{kind}", "invalid_value")


def check_configuration(options: DistillationOptions) -> None:
    """Raise InvalidRequest for options that `distill run` refuses, such as a rank for full copies."""
    from distill.config import load_config  # here, because most servers run no jobs
    from distill.errors import ConfigError

    assert options.preset is not None
    try:
        load_config(options.preset, options.overrides())
    except ConfigError as error:
        field = next((name for name, key in KEYS.items() if str(error).startswith(f"{key} ")), None)
        param = "distillation" if field is None else f"distillation.{field}"
        raise InvalidRequest(f"{param}: {error}", param, "invalid_value") from error


def budget_warning(options: DistillationOptions) -> str | None:
    """Return why a budget in images can only give blur or noise; None if it may give more, or is not known here."""
    preset = next((each for each, _ in _presets() if each.name == options.preset), None)
    images, batch = options.images, options.batch or (preset.batch if preset else None)
    if images is None or batch is None or images >= MIN_STEPS * batch:
        return None
    steps = max(1, images // batch)
    return (
        f"The budget of {images} images is {steps} {'step' if steps == 1 else 'steps'} of {batch}. A student of fewer "
        f"than {MIN_STEPS} usually draws blur or noise: set images to {MIN_STEPS * batch} or more, or lower batch."
    )


@cache
def _presets() -> tuple[tuple[PresetChoice, str], ...]:
    """Return the presets and the teachers that they name."""
    found = []
    for name in presets.names():
        values = presets.read(name)
        images, batch = int(values.get("images", presets.IMAGES)), int(values.get("batch", presets.BATCH))
        method = values.get("method", {}).get("name", presets.METHOD)
        choice = PresetChoice(
            name=name, description=presets.summary(name), method=method, images=images, batch=batch, teachers=[]
        )
        found.append((choice, str(values.get("teacher", ""))))
    return tuple(found)


def _is_available(settings: Settings, name: str) -> bool:
    try:
        find_teacher(settings.jobs.teachers, name)
    except NotFound:
        return False
    return True
