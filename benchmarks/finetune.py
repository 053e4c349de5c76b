"""Stage `finetune` at the real profile's size: see `training`."""

from training import main

if __name__ == "__main__":
    main("finetune")
