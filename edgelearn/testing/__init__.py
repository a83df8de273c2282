"""For authors of plug-ins: checks of the contract, toy data, and a file to start from.

`contract` checks a client strategy (`check_strategy`); `checks` holds what it checks, one function
each, and `calls` how hooks are called and compared. `toy` makes data, a network and whole scenarios
that train in milliseconds. `template` writes a strategy to start from. To add a check, write a
function in `checks` that returns what it saw or raises `Broken`, and name it in `CHECKS`, after
the checks that it needs. `codecs` checks a codec (`check_codec`).
"""
