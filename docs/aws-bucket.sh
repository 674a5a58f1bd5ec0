#!/bin/sh
# Creates the bucket of aws-bucket.yaml by commands: versioning, Object Lock, TLS only, nothing public, a user for the
# node that can only put, and a user for a recovery that can list and get.
#
#     aws-bucket.sh BUCKET PREFIX [RETENTION_MODE] [RETENTION_DAYS] [NONCURRENT_DAYS]
#
# PREFIX is S3_BACKUP_PREFIX with its slash, or '' for the whole bucket. This needs the aws command, the credentials of
# an administrator, and AWS_REGION. It stops at the first command that fails.
set -eu
bucket=${1:?"usage: aws-bucket.sh BUCKET PREFIX [RETENTION_MODE] [RETENTION_DAYS] [NONCURRENT_DAYS]"}
prefix=${2?"PREFIX, such as node1/"}
mode=${3:-GOVERNANCE} days=${4:-365} noncurrent=${5:-365}
region=${AWS_REGION:?"the region of the bucket"}
export AWS_DEFAULT_REGION="$region" AWS_PAGER=
case $region in cn-*) partition=aws-cn ;; us-gov-*) partition=aws-us-gov ;; *) partition=aws ;; esac
arn=arn:$partition:s3:::$bucket

# us-east-1 is the only region that must not be named here.
set -- --bucket "$bucket" --object-lock-enabled-for-bucket --object-ownership BucketOwnerEnforced
[ "$region" = us-east-1 ] || set -- "$@" --create-bucket-configuration "LocationConstraint=$region"
aws s3api create-bucket "$@" >/dev/null
aws s3api put-public-access-block --bucket "$bucket" --public-access-block-configuration \
    BlockPublicAcls=true,BlockPublicPolicy=true,IgnorePublicAcls=true,RestrictPublicBuckets=true
aws s3api put-bucket-versioning --bucket "$bucket" --versioning-configuration Status=Enabled
aws s3api put-object-lock-configuration --bucket "$bucket" --object-lock-configuration \
    '{"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": {"Mode": "'"$mode"'", "Days": '"$days"'}}}' >/dev/null
aws s3api put-bucket-lifecycle-configuration --bucket "$bucket" --lifecycle-configuration '{"Rules": [
    {"ID": "noncurrent-versions", "Status": "Enabled", "Filter": {"Prefix": ""},
     "NoncurrentVersionExpiration": {"NoncurrentDays": '"$noncurrent"'}},
    {"ID": "unfinished-uploads", "Status": "Enabled", "Filter": {"Prefix": ""},
     "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}}]}' >/dev/null
aws s3api put-bucket-policy --bucket "$bucket" --policy '{"Version": "2012-10-17", "Statement": [
    {"Sid": "TlsOnly", "Effect": "Deny", "Principal": "*", "Action": "s3:*",
     "Resource": ["'"$arn"'", "'"$arn"'/*"], "Condition": {"Bool": {"aws:SecureTransport": "false"}}}]}'

aws iam create-user --user-name "$bucket-node" >/dev/null
aws iam put-user-policy --user-name "$bucket-node" --policy-name put-only --policy-document \
    '{"Version": "2012-10-17", "Statement": [
    {"Effect": "Allow", "Action": "s3:PutObject", "Resource": "'"$arn/$prefix"'*"}]}'
aws iam create-user --user-name "$bucket-reader" >/dev/null
aws iam put-user-policy --user-name "$bucket-reader" --policy-name list-and-get --policy-document \
    '{"Version": "2012-10-17", "Statement": [
    {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:ListBucketVersions"], "Resource": "'"$arn"'"},
    {"Effect": "Allow", "Action": ["s3:GetObject", "s3:GetObjectVersion"], "Resource": "'"$arn/$prefix"'*"}]}'

cat <<EOF
created s3://$bucket: $mode for $days days; noncurrent versions are removed after $noncurrent days
create the node's key:      aws iam create-access-key --user-name $bucket-node
create the recovery key:    aws iam create-access-key --user-name $bucket-reader
EOF
