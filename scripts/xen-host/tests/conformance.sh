# what the models promise of Xen holds in a real dom0: grants, event channels, named pages and xenstore
# test program: tap-linux xen
. /xen-host/lib.sh

tap-linux-xen --color never 2>&1 | tee log || fail "some bodies"
# If a device is missing, all are ignored, which is not a success here.
grep -q ' 0 ignored;' log || fail "some bodies did not run"
if xenstore-ls / | grep -q tap-conformance; then fail "something is left in xenstore"; fi
