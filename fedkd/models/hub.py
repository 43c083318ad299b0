"""The Hugging Face hub: what its cache on this machine has is taken from there; else one look, and an error at once.

The hub's own client tries every file six times over half a minute before it gives up on a network that is not there.
"""

from contextlib import suppress
from pathlib import Path

from fedkd.errors import SettingError, one_line

_SECONDS = 5.0


def check_reachable(name: str, *, spec: str, key: str, cure: str) -> None:
    """Refuse a model that the hub does not have, or that cannot be asked for from here.

    Args:
        name: of the model on the hub, `OWNER/NAME`.
        spec: the setting's value.
        key: the setting that holds it.
        cure: what to do without a network, beside bringing the hub's cache along.

    Raises:
        SettingError: on `key`, within seconds, with the cure.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    cache = constants.HF_HUB_CACHE
    try:
        HfApi().model_info(name, timeout=_SECONDS)
    except RepositoryNotFoundError as error:
        allowed = f"a model that {constants.ENDPOINT} has and that is open to you (a private one needs HF_TOKEN)"
        raise SettingError(key, spec, allowed) from error
    except Exception as error:  # the client's own errors, those of its HTTP library, a name that is none
        allowed = f"a model that {constants.ENDPOINT} has and this machine reaches, or one in its cache {cache}"
        without = f"without a network, bring that folder along, or {cure}"
        raise SettingError(key, spec, f"{allowed}; {without} ({one_line(error)})") from error


def holds(name: str, files: tuple[str, ...], *, spec: str, key: str, cure: str) -> bool:
    """Tell whether a model of the hub has any of some files, by the cache or, where it says nothing, by the hub.

    Raises:
        SettingError: on `key`: the hub is out of reach.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        found = [try_to_load_from_cache(name, file) for file in files]
    except ValueError:
        found = [None]  # a name that is none: the look at the hub says so
    if any(isinstance(file, str) for file in found):
        return True
    if None not in found:  # the cache knows that there are none
        return False
    check_reachable(name, spec=spec, key=key, cure=cure)
    return any(HfApi().file_exists(name, file) for file in files)


def fetched(name: str, files: tuple[str, ...], *, spec: str, key: str, cure: str) -> Path:
    """Return the first of some files that a model of the hub has, from the cache or downloaded into it.

    Raises:
        SettingError: on `key`: it has none of them, or is out of reach.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        with suppress(EntryNotFoundError):
            return Path(hf_hub_download(name, file, local_files_only=True))
    check_reachable(name, spec=spec, key=key, cure=cure)
    missed: Exception | None = None
    for file in files:
        try:
            return Path(hf_hub_download(name, file))
        except EntryNotFoundError as error:
            missed = error
        except Exception as error:  # a connection that broke off, a full disk
            raise SettingError(key, spec, f"a model whose {file} can be downloaded ({one_line(error)})") from error
    raise SettingError(key, spec, f"a model with {' or '.join(files)} on the hub ({name} has none)") from missed
