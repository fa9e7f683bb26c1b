"""One module per stage, each a function and an entry point of the same name; and the `rayrlhf` command."""

import sys

from rayrlhf.errors import UserError
from rayrlhf.rooms import check_rooms

try:
    check_rooms()
except UserError as error:
    sys.exit(f"error: {error}")
