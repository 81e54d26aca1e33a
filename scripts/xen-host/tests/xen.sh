# Xen, its tools and xenstored answer, and the devices of a back end exist
. /xen-host/lib.sh

xl info | grep -E '^(xen_version|total_memory|free_memory)' || fail "xl info"
xl list | grep -q '^Domain-0 ' || fail "xl list shows no dom0"

xenstore-write /test/key value
[ "$(xenstore-read /test/key)" = value ] || fail "what was written to xenstore is not read"
xenstore-rm /test
if xenstore-exists /test; then fail "what was removed from xenstore is there"; fi

for device in evtchn gntdev gntalloc privcmd xenbus xenbus_backend; do
    [ -c "/dev/xen/$device" ] || fail "there is no /dev/xen/$device"
done
