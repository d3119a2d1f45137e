"""``python -m uso_engine`` is ``uso-engine``; torchrun starts it so."""

from __future__ import annotations

from uso_engine.cli import main

if __name__ == "__main__":
    main()
