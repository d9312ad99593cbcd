#!/bin/sh
# dagster 1.13.27: a sensor's tick that reports an asset's events and wants no run is told as an empty result.
#
# The events are stored all the same, and the cursor moves. What this package does: its sensors say in the tick what they
# reported, and nobody has to read the daemon's line.
. "$(dirname "$0")/lib.sh"

install dagster==1.13.27
cat >"$folder/tick.py" <<'END'
from dagster import AssetKey, AssetMaterialization, DagsterInstance, SensorResult, build_sensor_context, sensor


@sensor()
def reports(context):
    return SensorResult(asset_events=[AssetMaterialization(AssetKey("facts"))], cursor="1")


with DagsterInstance.ephemeral() as instance, build_sensor_context(instance=instance, cursor="0") as context:
    tick = reports.evaluate_tick(context)
print("events of assets:", len(tick.asset_events))
print("cursor:", tick.cursor)
print("told of the tick:", tick.skip_message)
END
"$folder/env/bin/python" "$folder/tick.py" 2>"$folder/log" | seen_is "events of assets: 1
cursor: 1
told of the tick: Sensor function returned an empty result"
