"""Check what training needs on this machine: one line for each thing, which ends in ok or the fix.

python doctor.py        python doctor.py 'checks=[card,attention]'        python doctor.py --help
"""

from wantrain.util import ctrl_c

if __name__ == "__main__":
    ctrl_c.ends_at_once()  # while the imports below load

from pathlib import Path

from omegaconf import DictConfig

from wantrain import checks, config
from wantrain.doctor import Options, examine
from wantrain.util import distributed


@config.app("doctor")
def main(cfg: DictConfig) -> None:
    """Make the checks and print what they find; exit code 2 if something that training needs is broken."""
    checks.check(cfg, given=config.given(cfg))
    distributed.single_process("doctor.py")
    distributed.set_threads()
    examine(Options(cfg.device, Path(cfg.runs), cfg.timeout, config.ROOT), list(cfg.checks))


if __name__ == "__main__":
    main()
