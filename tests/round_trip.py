"""A configuration written and read again, by us and by another reader of YAML."""

import json

import yaml

from m4.config import config_from_dict, config_to_dict, config_to_yaml, load_config


def assert_round_trip(config, folder):
    (folder / "saved.yaml").write_bytes(config_to_yaml(config).encode())
    assert load_config(folder / "saved.yaml") == (config, [])
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    # Any other YAML reader takes the text for text, too; the backslash before ${ is OmegaConf's.
    plain = yaml.safe_load(config_to_yaml(config))
    assert plain["run_name"] == config.run_name
    assert plain["data"]["root"] == config.data.root or "${" in config.data.root
