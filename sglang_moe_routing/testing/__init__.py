"""For tests of policies and servers: the slow `oracle`, and what holds policies and calls to it.

`check_policy` runs a policy through the cases that are easily forgotten; `check_calls` holds what a
server really ran, as its recorder wrote it down, to the oracle.
"""

from .calls import Checked, check_calls, read_records
from .policy import check_policy

__all__ = ["Checked", "check_calls", "check_policy", "read_records"]
