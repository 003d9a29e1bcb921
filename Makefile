PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
DATA := output/fashion_mnist
QUICKSTART := output/quickstart

.PHONY: help venv quickstart test lint

help:
	@echo "make venv        make $(VENV) and install the package with its training and development tools into it"
	@echo "make quickstart  train a small VMamba on real images and validate it: minutes on two CPU cores"
	@echo "make test        run the tests"
	@echo "make lint        check style and types"

$(RUN):
	$(PYTHON) -m venv $(VENV)

# nnU-Net's architectures ask for an older timm than ours does, and use nothing of it that changed: hence --no-deps.
venv: $(RUN)
	$(RUN) -m pip install --quiet -e ".[dev]"
	$(RUN) -m pip install --quiet --no-deps "nnunetv2>=2.8,<2.9" "dynamic-network-architectures>=0.4.4"

# Only what training needs: the development tools would double the wait for a first result.
$(VENV)/.train: pyproject.toml | $(RUN)
	$(RUN) -m pip install --quiet -e ".[train]"
	@touch $@

$(DATA): examples/fashion_mnist.tar.gz
	mkdir -p output
	tar xzf $< -C output
	@touch $@

# A finished run is left as it is and an interrupted one continues; remove $(QUICKSTART) to begin anew.
# One thread: so small a network gains nothing from a second one, which the process that reads images needs.
quickstart: $(VENV)/.train $(DATA)
	OMP_NUM_THREADS=1 $(RUN) tools/train.py --config configs/image/quickstart.yaml --data-dir $(DATA) \
		--output $(dir $(QUICKSTART)) --experiment $(notdir $(QUICKSTART)) --resume auto
	$(RUN) tools/validate.py --data-dir $(DATA) --model $(QUICKSTART) --results-file $(QUICKSTART)/validation.json
	$(RUN) tools/predict.py $(DATA)/val --model $(QUICKSTART) --output $(QUICKSTART)/predictions
	@echo
	@echo "checkpoint    $(QUICKSTART)/model_best.pth"
	@echo "results       $(QUICKSTART)/results.csv"
	@echo "curves        $(QUICKSTART)/curves.png"
	@echo "predictions   $(QUICKSTART)/predictions.png"
	@echo "load it       ssmvision.create_model(\"local-dir:$(QUICKSTART)/export\", pretrained=True)"

# One thread in each of as many processes as there are cores.
test: venv
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
