#!/bin/sh
# Known vulnerabilities of the locked packages, for `make lint`: pip-audit asks the package index for advisories.
# Exit status 1 where there is one, or pip-audit fails; 0 where nobody answers, which is said: what can't be known
# without a network fails nothing. Options go to pip-audit.
set -eu

accepted=requirements/accepted-advisories    # lines `ID reason`
unreasoned=$(grep -Ev '^(#|$|[A-Za-z0-9-]+ +[^ ])' "$accepted" || true)
if [ -n "$unreasoned" ]; then
    echo "audit: $accepted: give a reason behind: $unreasoned" >&2
    exit 1
fi
ignored=$(sed -n 's/^\([A-Za-z0-9][A-Za-z0-9-]*\) .*/--ignore-vuln \1/p' "$accepted")

# pip-audit exits with 1 for a finding and for any error, and with 0 where the index knows no advisories, as a mirror's.
no_answer='requests\.exceptions\.|Could not connect|not redirecting'
unknown='could not be audited'
status=0
for list in $(ls -rS requirements/*.txt); do    # the shortest first: it shows whether anybody answers
    code=0
    # shellcheck disable=SC2086  # several words, or none
    said=$(.venv/bin/pip-audit --require-hashes --disable-pip --progress-spinner off --timeout 10 $ignored \
        --requirement "$list" "$@" 2>&1) || code=$?
    last=$(echo "$said" | grep -E "$no_answer|$unknown" | tail -n 1)
    unaudited=$(echo "$said" | grep -c "$unknown" || true)
    if echo "$said" | grep -q '^Found '; then
        echo "audit: $list: $said"
        status=1
    elif [ "$unaudited" -ge "$(grep -c '^[A-Za-z0-9].*==' "$list")" ] || { [ $code -ne 0 ] && [ -n "$last" ]; }; then
        echo "audit: NOT DONE from $list on, nobody has advisories: $last"
        break
    elif [ $code -ne 0 ]; then
        echo "audit: $list: pip-audit failed: $said"
        status=1
    elif [ "$unaudited" -gt 0 ]; then
        echo "audit: $list: $unaudited packages are not known to the index, the rest is without known vulnerabilities: $last"
    else
        echo "audit: $list: no known vulnerabilities"
    fi
done
exit $status
