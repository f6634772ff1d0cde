"""Python reads this at its start where PYTHONPATH names the folder: the moment of CONTRACT_MOMENT comes to one rank.

`RANK PHASE NUMBER ACT`, before any restart by torchrun.
"""

import os

_rank, _, _moment = os.environ.get("CONTRACT_MOMENT", "").partition(" ")
if _rank and os.environ.get("RANK") == _rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    from contract.moments import Moments

    _phase, _number, _act = _moment.split()
    Moments(_phase, int(_number), _act)
