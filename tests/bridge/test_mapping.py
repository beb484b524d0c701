"""The table of names in hf/mapping.py is one that Bridge's registry of mappings takes."""


def test_bridge_finds_every_name_of_the_table_both_ways(run_bridge):
    assert "16 rows" in run_bridge("-m", "support.bridge_mapping")
