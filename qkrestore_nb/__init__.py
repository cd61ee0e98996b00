__version__ = "0.1.0"

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .hypenet import HypeNetForCausalLM as HypeNetForCausalLM
    from .in_place import undo as undo, verify as verify
    from .moves import plan as plan
    from .procrustes import qk_pro as qk_pro
    from .restore import qk_restore as qk_restore

_front_door = dict(
    qk_restore="restore", qk_pro="procrustes", plan="moves", verify="in_place", undo="in_place",
    HypeNetForCausalLM="hypenet",
)


def __getattr__(name: str):
    "The front door: what most people type, imported when it is first asked for; nobody waits for torch in vain."
    if name not in _front_door: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_front_door[name]}"), name)


def __dir__(): return sorted([*globals(), *_front_door])
