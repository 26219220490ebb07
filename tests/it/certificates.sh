# Certificates of every kind, made with openssl in the current folder: for each NAME there are NAME.pem (with the
# intermediate certificates that it needs), NAME.key, and NAME.ca.pem, the CA to trust.
set -eu

key() { # NAME KIND
  case $2 in
    RSA-PSS) openssl genpkey -quiet -algorithm RSA-PSS -pkeyopt rsa_keygen_bits:2048 -out "$1.key" ;;
    RSA*) openssl genpkey -quiet -algorithm RSA -pkeyopt "rsa_keygen_bits:${2#RSA}" -out "$1.key" ;;
    ED*) openssl genpkey -algorithm "$2" -out "$1.key" ;;
    *) openssl ecparam -name "$2" -genkey -noout -out "$1.key" ;;
  esac
}

authority() { # NAME KIND [SUBJECT]
  key "$1" "$2"
  openssl req -x509 -new -key "$1.key" -subj "/CN=${3:-$1}" -days 30 -out "$1.pem"
}

signed() { # NAME KIND CA EXTENSIONS [ARGUMENTS]
  name=$1 ca=$3
  key "$name" "$2"
  openssl req -new -key "$name.key" -subj "/CN=$name" -out request
  printf '%b' "$4" > extensions
  shift 4
  openssl x509 -req -in request -CA "$ca.pem" -CAkey "$ca.key" -CAcreateserial -days 20 -extfile extensions "$@" \
    -out "$name.pem" 2>> log
  cp "$ca.pem" "$name.ca.pem"
}

# The chain of NAME: these certificates come with it, and CA is to be trusted.
chain() { # NAME CA CERTIFICATES
  name=$1 ca=$2
  shift 2
  for other; do cat "$other.pem"; done >> "$name.pem"
  cp "$ca.pem" "$name.ca.pem"
}

names='subjectAltName=DNS:localhost,IP:127.0.0.1\n'
is_ca='basicConstraints=critical,CA:TRUE'
P256=prime256v1

authority ca $P256
authority rsa RSA2048
for kind in RSA2048 RSA4096 RSA1024 secp384r1 secp521r1 secp256k1 ED25519 ED448; do
  signed "key-$kind" $kind ca "$names"
done
for kind in RSA1024 RSA-PSS secp384r1 secp521r1 ED25519 ED448; do
  authority "ca-$kind" $kind
  signed "by-$kind" $P256 "ca-$kind" "$names"
done
for hash in sha1 sha256 sha384 sha512; do
  signed "ec-$hash" $P256 ca "$names" -$hash
  signed "rsa-$hash" $P256 rsa "$names" -$hash
  signed "pss-$hash" $P256 rsa "$names" -$hash -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:digest
done
signed pss-long-salt $P256 rsa "$names" -sigopt rsa_padding_mode:pss

signed wildcard $P256 ca 'subjectAltName=DNS:*.rabbit.example\n'
signed ip-as-dns $P256 ca 'subjectAltName=DNS:127.0.0.1\n'
signed uri $P256 ca 'subjectAltName=URI:spiffe://a/b,email:a@b.example\n'
signed usage-both $P256 ca "${names}extendedKeyUsage=critical,serverAuth,clientAuth\nkeyUsage=critical,digitalSignature\n"
signed usage-any $P256 ca "${names}extendedKeyUsage=anyExtendedKeyUsage\n"
signed usage-empty $P256 ca "${names}2.5.29.37=DER:3000\n"
signed key-usage-ignored $P256 ca "${names}keyUsage=critical,keyCertSign\n"
signed unknown-critical $P256 ca "${names}1.2.3.4=critical,DER:0500\n"
signed unknown $P256 ca "${names}1.2.3.4=DER:0500\n"

key version-1 $P256
openssl req -new -key version-1.key -subj /CN=localhost -out request
openssl x509 -req -in request -CA ca.pem -CAkey ca.key -CAcreateserial -days 20 -out version-1.pem 2>> log
cp ca.pem version-1.ca.pem
# A CA of version 1 is trusted: what is in the file of CAs isn't checked.
key version-1-ca RSA2048
openssl req -new -key version-1-ca.key -subj /CN=old -out request
openssl x509 -req -in request -signkey version-1-ca.key -days 20 -out version-1-ca.pem 2>> log
signed by-version-1 $P256 version-1-ca "$names"

# The CA again, under the same name: with another key of the same kind, and of another kind.
authority ca-again $P256 ca
signed again $P256 ca-again "$names"
cp ca.pem again.ca.pem
authority ca-again-rsa RSA2048 ca
signed again-rsa $P256 ca-again-rsa "$names"
cp ca.pem again-rsa.ca.pem

signed intermediate $P256 ca "$is_ca\n"
signed with-intermediate $P256 intermediate "$names"
chain with-intermediate ca intermediate
signed intermediate-missing $P256 intermediate "$names"
chain intermediate-missing ca
signed intermediate-trusted $P256 intermediate "$names"
signed no-ca $P256 ca 'basicConstraints=critical,CA:FALSE\n'
signed by-no-ca $P256 no-ca "$names"
chain by-no-ca ca no-ca
signed short $P256 ca "$is_ca,pathlen:0\n"
signed below-short $P256 short "$is_ca\n"
signed path-too-long $P256 below-short "$names"
chain path-too-long ca below-short short
signed constrained $P256 ca "$is_ca\nnameConstraints=critical,permitted;DNS:rabbit.example\n"
signed outside-names $P256 constrained "$names"
chain outside-names ca constrained
above=ca all=
for level in 1 2 3 4 5 6 7; do
  signed "level$level" $P256 $above "$is_ca\n"
  above=level$level all="$above $all"
  if [ $level -ge 6 ]; then
    signed "below$level" $P256 $above "$names"
    chain "below$level" ca $all
  fi
done
